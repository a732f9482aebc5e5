TESTS = ("tests/training/test_data.py", "tests/training/test_packing.py", "tests/training/test_trainer.py")
DOCUMENTS, LAYOUT = "nvlm_runtime/training/documents.py", "nvlm_runtime/inputs/layout.py"
SOURCE, TRAINER = "nvlm_runtime/training/source.py", "nvlm_runtime/training/trainer.py"
OPTIMIZER, PROMPT = "nvlm_runtime/training/optimizer.py", "nvlm_runtime/inputs/prompt.py"
PAST, OBJECTIVE = "nvlm_runtime/model/past.py", "nvlm_runtime/training/objective.py"
MUTATIONS = [
    (
        "nvlm_runtime/training/packing.py",
        "place = random.choices(fits, [room[row] ** 2 for row in fits])[0]",
        "place = fits[0]",
        "sequences hold documents of one length",
    ),
    (DOCUMENTS, "tuple(labels[1:])", "tuple(labels[:-1])", "labels are the tokens themselves"),
    (PROMPT, "writer.answers.append((start, ", "writer.answers.append((start - 1, ", "the prefix's newline is learnt"),
    (LAYOUT, "layout.intervals + first_key", "layout.intervals", "a packed document sees the first one's images"),
    (LAYOUT, "position + start for position", "position for position", "image tokens go into the first document"),
    (
        PAST,
        "self.intervals[row, start:end, 0] = start",
        "self.intervals[row, start:end, 0] = 0",
        "positions go on through a row",
    ),
    (
        PAST,
        "self._pieces += [(True, end - start) for start, end in spans]",
        "self._pieces += [(True, spans[-1][1])] if spans else []",
        "documents of a row see each other",
    ),
    (
        TRAINER,
        "loss = self.objective(batch, self.recipe.loss_rows) / max(1, learnt)",
        "loss = self.objective(batch, self.recipe.loss_rows) / max(1, int((batch.labels != IGNORE).sum()))",
        "micro-batches count alike",
    ),
    (
        SOURCE,
        "enumerate(groups[skip:], skip + 1)",
        "enumerate(groups[max(0, skip - 1):], max(1, skip))",
        "a resumed run reads a batch again",
    ),
    (OPTIMIZER, "recipe.decay_norms_and_gates or p.dim() > 1", "True", "trap 32: gates and norms decay"),
    (OPTIMIZER, "grad if master.grad is None else master.grad.add_(grad)", "grad", "only the last micro-batch counts"),
    (OPTIMIZER, '"muon" if recipe.muon_lr and', '"muon" if', "Muon moves all there is"),
    (OPTIMIZER, "self.peaks[kind] * rate / self.recipe.lr", "rate", "Muon has AdamW's rate"),
    (TRAINER, "        self._cut_metrics()\n", "", "lines of lost steps stay"),
    (
        OBJECTIVE,
        "with torch.set_grad_enabled(vision_learns(self.model)):",
        "with torch.set_grad_enabled(False):",
        "the vision encoder never learns",
    ),
]
