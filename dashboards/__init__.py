"""Grafana dashboards and Prometheus rules of Jenga Serve, as code.

Every metric is named through `dashboards.source`, which knows the registry of `jenga.metrics`: a name that nothing
exports is an error when dashboards are built, not an empty panel in production.
"""
