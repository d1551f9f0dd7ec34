"""pi0.5's first phase, without any server: from pictures and a task to a subtask in words. In JAX."""
