"""`jenga plan`: what every strategy makes of a model's memory, side by side."""

from jenga.plan.report import GroupRow, LengthRow, PlanReport, StrategyReport, plan_report

__all__ = ["GroupRow", "LengthRow", "PlanReport", "StrategyReport", "plan_report"]
