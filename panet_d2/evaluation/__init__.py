from .build import build_evaluator, check_evaluators, detection_limit, inference_folder

__all__ = ["build_evaluator", "check_evaluators", "detection_limit", "inference_folder"]
