"""Marker strings, marker ids and protocol intervals that code outside this package imports by name."""

# Labels that the loss skips, and the id that stands for one image in a sequence of token ids.
IGNORE_INDEX = -100
IMAGE_TOKEN_INDEX = -200

# Marker strings in prompts. Only `<image>` is always used; the others appear where a checkpoint's config asks for them.
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"

# Serving: seconds between a worker's heart-beats, and after how many without one the controller drops it.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."
