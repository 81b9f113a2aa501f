"""Ray Serve: engine replicas, the OpenAI ingress and the router."""
