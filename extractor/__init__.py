"""The extraction job: a frozen target runs once over a dataset, and what a draft needs of it becomes a cache."""

from cache_format import __version__

__all__ = ["__version__"]
