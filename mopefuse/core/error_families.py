"""The families of error codes: the middle of ``MF-<family>-<nn>``. Their numbers are in `mopefuse.core.error_codes`."""

from __future__ import annotations

from enum import IntEnum

_FAMILIES = {
    "ConfigCode": "CFG",
    "DataCode": "DATA",
    "PathCode": "SEC",
    "EncoderCode": "ENC",
    "PackageCode": "ENV",
    "CheckpointCode": "CKPT",
    "ResourceCode": "RES",
    "NumericCode": "NUM",
    "PluginCode": "PLUG",
    "GateCode": "GATE",
    "RequestCode": "REQ",
}


class ErrorCode(IntEnum):
    """A number of one family."""

    @property
    def text(self) -> str:
        """The whole code, ``MF-DATA-11``."""
        return f"MF-{_FAMILIES[type(self).__name__]}-{int(self):02d}"
