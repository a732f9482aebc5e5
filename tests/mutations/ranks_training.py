TESTS = ("tests/parallel/test_training.py", "-k", "2x1 or 2x2")
WEIGHTS, OBJECTIVE = "nvlm_runtime/checkpoint/tensors.py", "nvlm_runtime/training/objective.py"
TRAINER, OPTIMIZER = "nvlm_runtime/training/trainer.py", "nvlm_runtime/training/optimizer.py"
SOURCE, FSDP = "nvlm_runtime/training/source.py", "nvlm_runtime/training/fsdp.py"
CHECKPOINT, LOSS = "nvlm_runtime/training/checkpoint.py", "nvlm_runtime/training/loss.py"
MUTATIONS = [
    (FSDP, "set_gradient_divide_factor(1.0)", "set_gradient_divide_factor(2.0)", "gradients are a mean over ranks"),
    (OBJECTIVE, "batch = with_unseen_image(self.model, batch)", "pass", "ranks without a picture leave modules out"),
    (TRAINER, "share=(mesh.data.rank, mesh.data.size),", "", "data-parallel ranks learn from the same rows"),
    (TRAINER, "total = data.all_reduce(total).item()", "total = total.item()", "a rank's own loss is told"),
    (SOURCE, "if number % self.share[1] < self.share[1] - 1:", "if False:", "a rank's batch comes again"),
    (WEIGHTS, "data.all_reduce(model.group.all_reduce(total))", "model.group.all_reduce(total)", "the norm of a share"),
    (WEIGHTS, "sum(dtype=torch.float64) / entry.copies", "sum(dtype=torch.float64)", "what all hold counts twice"),
    (WEIGHTS, "begin, end = max(self.at, first)", "begin, end = max(self.at, 0)", "every rank has the first rows"),
    (OPTIMIZER, "mul_(clip / norm)", "mul_(1)", "gradients are not clipped"),
    (CHECKPOINT, '{f"part-{mesh.tensor.rank}": state', '{"part": state', "tensor-parallel ranks write over each other"),
    (
        LOSS,
        "largest = group.largest(logits.detach().amax(-1))",
        "largest = logits.detach().amax(-1)",
        "another maximum a rank",
    ),
]
