"""Clusters by `ray up`: checks before it, what runs on the head, and the commands `jenga up`, `down` and `status`."""
