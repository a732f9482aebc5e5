KERNELS = "nvlm_kernels/ops/rms_norm.py"
FILE = "nvlm_kernels/ops/add_rms_norm.py"
MUTATIONS = [
    (KERNELS, "        x = total.to(tl.float32)\n", "", "norms x, not the sum"),
    (
        KERNELS,
        "tl.store(total_ptr + offs, total, mask=mask)",
        "tl.store(total_ptr + offs, x, mask=mask)",
        "stores x for the sum",
    ),
    (
        KERNELS,
        "other=0.0).to(tl.float32)).to(dtype)\n",
        "other=0.0).to(tl.float32))\n",
        "norms the sum before it is rounded",
    ),
    (
        KERNELS,
        "tl.load(branch_ptr + offs, mask=mask, other=0.0)",
        "tl.load(branch_ptr + offs, mask=mask)",
        "no other= under the branch",
    ),
    (KERNELS, "dx += tl.load(skip_ptr", "dx = tl.load(skip_ptr", "dx of the residual path only"),
    (KERNELS, "dx += tl.load(skip_ptr", "dx -= tl.load(skip_ptr", "the residual path's gradient has the wrong sign"),
    (FILE, "return dx, dx, dweight, None", "return dx, dtotal, dweight, None", "dbranch without the norm's part"),
    (
        FILE,
        "ctx.save_for_backward(output[0], weight)",
        "ctx.save_for_backward(inputs[0], weight)",
        "backward at x, not at the sum",
    ),
    (
        FILE,
        "dy.contiguous(), dtotal.contiguous()",
        "dtotal.contiguous(), dy.contiguous()",
        "the outputs' gradients are swapped",
    ),
]
