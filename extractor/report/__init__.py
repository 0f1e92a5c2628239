"""report: what a person looks at before trusting a cache to a training run."""
