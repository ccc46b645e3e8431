"""SmolLM2-135M-Instruct trained by this project and by TRL on the same real rows: quality, time and memory."""
