"""MiniLLM, a policy gradient of the reverse KL divergence with teacher-mixed sampling, for distillkit."""
