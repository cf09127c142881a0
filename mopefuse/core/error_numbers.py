"""The numbers of encoder errors (``MF-ENC-nn``) and of weight-file errors (``MF-CKPT-nn``). Stable: add, never reuse.

21 and 22 are raised by `mopefuse.encoders.base`.
"""

from __future__ import annotations

# what was asked for
UNKNOWN_NAME = 23
BAD_OPTION = 24
UNKNOWN_OPTION = 25
NO_FOLDER = 26
NEEDS_TOWER = 27
NO_BUILT_IN_CONFIG = 28
CANNOT_BUILD = 29

# what a repository or folder holds
BAD_CONFIG = 30
REMOTE_CODE = 31
UNSUITABLE = 32
NO_SAFETENSORS = 33
NO_TOKENIZER = 34
NO_IMAGE_CONFIG = 35

# the way to a repository
OFFLINE = 36
UNREACHABLE = 37
GATED = 38
NOT_VISIBLE = 39
NOT_FOUND = 40
BAD_TOKEN = 41
FORBIDDEN = 42
NO_REVISION = 43
HUB_FAILED = 44
BROKEN_DOWNLOAD = 45

# LoRA
LORA_UNKNOWN = 80
LORA_NO_LAYER = 81
LORA_UNHEARD = 82

# CheckpointError: a file of weights
DAMAGED_FILE = 2
KEYS_DIFFER = 42

# ResourceError: the disk below the hub's cache
CACHE_NOT_WRITABLE = 21
