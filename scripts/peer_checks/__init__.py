"""One file a project: its own drafts, losses and readers, fed by cache_format.adapters and by the target itself."""
