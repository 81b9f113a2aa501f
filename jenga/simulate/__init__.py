"""Serving simulated on the real allocator, policies and prefix cache: no GPU, no model."""

from jenga.simulate.clairvoyant import HitBound, dense_bytes_per_token, hit_bound
from jenga.simulate.cluster import ClusterResult, ReplicaLoad, UnknownRouterError, simulate_cluster
from jenga.simulate.cost import StepCost
from jenga.simulate.engine import Limits, Simulation, simulate
from jenga.simulate.exact import exact_plan
from jenga.simulate.planning import plan_for
from jenga.simulate.report import CAUSES, WASTE, MemorySample, Percentiles, SimulationResult, bytes_by_cause
from jenga.simulate.routers import ROUTERS, Router

__all__ = [
    "CAUSES",
    "ROUTERS",
    "WASTE",
    "ClusterResult",
    "HitBound",
    "Limits",
    "MemorySample",
    "Percentiles",
    "ReplicaLoad",
    "Router",
    "Simulation",
    "SimulationResult",
    "StepCost",
    "UnknownRouterError",
    "bytes_by_cause",
    "dense_bytes_per_token",
    "exact_plan",
    "hit_bound",
    "plan_for",
    "simulate",
    "simulate_cluster",
]
