"""vLLM as a backend: engines of its worker processes compute the states, this process takes them from shared memory."""
