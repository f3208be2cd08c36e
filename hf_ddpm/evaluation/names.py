"""The words by which an evaluation is asked for; they stand apart and answer a wrong one before torch loads."""

# Metrics that compare features of samples with a reference -> the names of their results.
DISTANCES = {
    "fd": ("fd",),
    "kid": ("kid",),
    "cmmd": ("cmmd",),
    "precision": ("precision", "recall", "density", "coverage"),
}
METRICS = (*DISTANCES, "nll", "memorization")
NETWORK_NAMES = ("inception", "dinov2", "clip", "efficientnet-lite0")
