"""Test-time scaling with a draft and a target model, and a promised rate of takeovers (ATTS, arXiv 2509.15148)."""

from pyquiet.scaling.atts import ATTS
from pyquiet.scaling.backends.base import Backend, BackendError, ContextOverflowError, GoneError, RefusedError
from pyquiet.scaling.calibration import Calibrator, Hierarchical, PerQuestion, PerTurn, Pooled
from pyquiet.scaling.calibration_files import load_calibrator, save_calibrator
from pyquiet.scaling.calls import Retry
from pyquiet.scaling.conformal import Bank, Budget, Rule
from pyquiet.scaling.drift import DriftMonitor
from pyquiet.scaling.journal import Journal, read_journal
from pyquiet.scaling.learning import Adaptive, Online
from pyquiet.scaling.limits import TakeoverLimit
from pyquiet.scaling.plan import Plan, Pools, Sampling
from pyquiet.scaling.policy import (
    AcceptAll,
    ConformalPolicy,
    OfficialPolicy,
    Policy,
    RankPolicy,
    RSDPolicy,
    SpecReasonPolicy,
)
from pyquiet.scaling.questions import as_questions, read_questions
from pyquiet.scaling.records import Question
from pyquiet.scaling.report import Report
from pyquiet.scaling.result import ATTSResult, QuestionResult
from pyquiet.scaling.score import JudgeGrade, MeanEntropy, MeanNLL, Reward, ScoreFn, TailNLL

__all__ = [
    "ATTS",
    "ATTSResult",
    "AcceptAll",
    "Adaptive",
    "Backend",
    "BackendError",
    "Bank",
    "Budget",
    "Calibrator",
    "ConformalPolicy",
    "ContextOverflowError",
    "DriftMonitor",
    "GoneError",
    "Hierarchical",
    "Journal",
    "JudgeGrade",
    "MeanEntropy",
    "MeanNLL",
    "OfficialPolicy",
    "Online",
    "PerQuestion",
    "PerTurn",
    "Plan",
    "Policy",
    "Pooled",
    "Pools",
    "Question",
    "QuestionResult",
    "RSDPolicy",
    "RankPolicy",
    "RefusedError",
    "Report",
    "Retry",
    "Reward",
    "Rule",
    "Sampling",
    "ScoreFn",
    "SpecReasonPolicy",
    "TailNLL",
    "TakeoverLimit",
    "as_questions",
    "load_calibrator",
    "read_journal",
    "read_questions",
    "save_calibrator",
]
