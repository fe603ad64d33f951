"""What models are worth: gains by difficulty, direct answers, majority votes."""

from pyquiet.evaluation.answers import AnswerScores, DirectAnswers, direct_answers
from pyquiet.evaluation.difficulty import DifficultyTable, TokenGains, gain_by_decile, thinking_gains
from pyquiet.evaluation.estimates import Estimate
from pyquiet.evaluation.prompts import opening_ids, token_ids
from pyquiet.evaluation.tasks import DIGITS, LETTERS, TASKS, AnswerItem, read_commonsenseqa, read_gsm8k
from pyquiet.evaluation.voting import MajorityVote, first_integer, majority, majority_vote

__all__ = [
    "DIGITS",
    "LETTERS",
    "TASKS",
    "AnswerItem",
    "AnswerScores",
    "DifficultyTable",
    "DirectAnswers",
    "Estimate",
    "MajorityVote",
    "TokenGains",
    "direct_answers",
    "first_integer",
    "gain_by_decile",
    "majority",
    "majority_vote",
    "opening_ids",
    "read_commonsenseqa",
    "read_gsm8k",
    "thinking_gains",
    "token_ids",
]
