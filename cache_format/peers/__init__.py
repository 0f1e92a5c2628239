"""Peers: offline caches of other projects, read as they lie. The other direction of ``export``."""

from collections.abc import Callable
from pathlib import Path

from cache_format.peers.arrangement import Arrangement
from cache_format.peers.deepspec import DeepSpecCache
from cache_format.peers.interface import POST_NORM, PRE_NORM, PeerCache, Record
from cache_format.peers.record_files import open_angelslim, open_modelopt, open_specforge
from cache_format.peers.speculators import SpeculatorsCache

PEERS: dict[str, Callable[[Path], PeerCache]] = {
    "deepspec": DeepSpecCache,
    "specforge": open_specforge,
    "speculators": SpeculatorsCache,
    "modelopt": open_modelopt,
    "angelslim": open_angelslim,
}
"""Name of ``--from`` -> what opens a folder of it."""

__all__ = ["PEERS", "POST_NORM", "PRE_NORM", "Arrangement", "PeerCache", "Record"]
