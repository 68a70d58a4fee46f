"""The metrics of an epoch: their names, and what values they can have."""

# Summed over the steps of an epoch, by each process for its part of the batch: see Learner.step.
SUMS = ("train_loss", "train_error", "conv1_gradient")
METRICS = ("epoch", "lr", *SUMS, "active_blocks", "images_per_second", "validation_error", "test_error", "seconds")
POSITIVE = ("images_per_second", "seconds")


def check_metrics(history: list[dict[str, float]]) -> None:
    """Raise ValueError or TypeError unless `history` has the metrics of epochs 1, 2, ..., each a possible number.

    It may have others, of a later version.
    """
    for epoch, line in enumerate(history, start=1):
        possible = isinstance(line, dict) and line.keys() >= set(METRICS) and line["epoch"] == epoch
        for name, value in ((name, line[name]) for name in METRICS) if possible else ():
            highest = 100 if name.endswith("_error") else 1e12 if name == "seconds" else 1e30
            possible &= type(value) in (int, float) and 0 <= value <= highest and (value > 0 or name not in POSITIVE)
        if not possible:
            raise ValueError(f"line {epoch} does not have the metrics of epoch {epoch}")
