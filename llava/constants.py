"""Image token strings and ids, and protocol intervals, that code outside this package imports by name."""

# Labels that the loss skips, and the id that stands for one image in a sequence of token ids.
IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200

# Strings in prompts. `<image>` is always used, the next three where a checkpoint's config asks for them.
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

# Serving: seconds between a worker's heart-beats, and seconds without one until the controller drops it.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."
