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

# The names of projectors: linear, identity, mlp1x_gelu, mlp2x_gelu, …; and what is said of any other.
PROJECTOR_NAME = r"linear|identity|mlp(?P<depth>[1-9]\d?)x_gelu"
UNKNOWN_PROJECTOR = "unknown mm_projector_type {!r}; known: linear, identity, mlp<N>x_gelu"

# Serving: seconds between a worker's heart-beats, and seconds without one until the controller drops it.
CONTROLLER_HEART_BEAT_EXPIRATION = 30
WORKER_HEART_BEAT_INTERVAL = 15

LOGDIR = "."
