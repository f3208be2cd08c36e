"""The words by which sampling is asked for; they stand apart and answer a wrong one before torch loads."""

# Those that sample a model which was not tuned for few steps.
UNTUNED_SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "unipc")
SCHEDULERS = (*UNTUNED_SCHEDULERS, "lcm")
# The steps of models that are tuned for few steps and keep no number.
TUNED_STEPS = 4
# The types that the network can compute in.
DTYPES = ("fp32", "bf16")
# Of the files of a set of images.
FORMATS = ("png", "parquet", "npz", "npy", "tif")
# Those of which a file holds one array.
ARRAY_FILE_FORMATS = ("npy", "tif")
# How two predictions are combined.
GUIDANCE_METHODS = ("cfg", "cfg-zero*", "apg", "tcfg")
