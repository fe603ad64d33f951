"""What models are worth: gains by difficulty, direct answers, majority votes, and how well gaps are filled,
and what masked diffusion writes.
"""

from pyquiet.evaluation.answers import AnswerScores, DirectAnswers, direct_answers
from pyquiet.evaluation.code_infilling import CodeProblem, infill_code, read_code_problems
from pyquiet.evaluation.difficulty import DifficultyTable, TokenGains, gain_by_decile, thinking_gains
from pyquiet.evaluation.diffusion import DiffusionRow, DiffusionTable, Matched, TextMetrics, diffusion_table
from pyquiet.evaluation.estimates import Estimate
from pyquiet.evaluation.generative import GenerativeTable, generative_table
from pyquiet.evaluation.infilling import InfillingScores, infill_stories, read_stories
from pyquiet.evaluation.judging import Judge, Judged, histogram_entropy, judge_texts
from pyquiet.evaluation.ngrams import NGramModel, distinct_ngrams, ngram_variation
from pyquiet.evaluation.tasks import DIGITS, LETTERS, TASKS, AnswerItem, read_commonsenseqa, read_gsm8k
from pyquiet.evaluation.voting import MajorityVote, first_integer, majority, majority_vote
from pyquiet.tokens import opening_ids, token_ids

__all__ = [
    "DIGITS",
    "LETTERS",
    "TASKS",
    "AnswerItem",
    "AnswerScores",
    "CodeProblem",
    "DifficultyTable",
    "DiffusionRow",
    "DiffusionTable",
    "DirectAnswers",
    "Estimate",
    "GenerativeTable",
    "InfillingScores",
    "Judge",
    "Judged",
    "MajorityVote",
    "Matched",
    "NGramModel",
    "TextMetrics",
    "TokenGains",
    "diffusion_table",
    "direct_answers",
    "distinct_ngrams",
    "first_integer",
    "gain_by_decile",
    "generative_table",
    "histogram_entropy",
    "infill_code",
    "infill_stories",
    "judge_texts",
    "majority",
    "majority_vote",
    "ngram_variation",
    "opening_ids",
    "read_code_problems",
    "read_commonsenseqa",
    "read_gsm8k",
    "read_stories",
    "thinking_gains",
    "token_ids",
]
