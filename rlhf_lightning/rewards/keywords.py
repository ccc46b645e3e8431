"""Rewards for words: keywords that should appear, and terms that must not."""

from collections.abc import Sequence

from rlhf_lightning.errors import ConfigError, check_whole
from rlhf_lightning.rewards.base import Reward, check_finite
from rlhf_lightning.text_search.terms import TermSearch, is_term, read_terms
from rlhf_lightning.types import Episode, Row


class KeywordReward(Reward):
    """`hit` for a response with at least `min_words` words and one of `keywords`, else `miss`.

    The defaults are the rule of the MinT recipe.

    Args:
        keywords: Keywords to search for in the response, ignoring case, also within words.
        min_words: Minimum number of words.
        hit: Score of a response that satisfies the rule.
        miss: Score of any other response.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Example:
        >>> reward = KeywordReward(keywords=["risk"], min_words=3)
        >>> reply = [{"role": "assistant", "content": "That is a risk."}]
        >>> reward.score([Episode(prompt=[], row={}, group=0, responses=reply)])
        [0.5]
    """

    def __init__(
        self,
        keywords: Sequence[str] = ("specific", "automatic", "risk", "restore", "actionable"),
        min_words: int = 6,
        hit: float = 0.5,
        miss: float = -0.1,
        weight: float = 1.0,
        name: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(weight, name)
        self.skip_special_tokens = skip_special_tokens
        if isinstance(keywords, str) or not keywords or not all(isinstance(w, str) and w.strip() for w in keywords):
            raise ConfigError(
                f"the keywords of the reward {self.name} are {keywords!r}; they must be a list of words, "
                "none of them empty"
            )
        check_whole(f"the min_words of the reward {self.name}", min_words, 0)
        check_finite(f"the hit of the reward {self.name}", hit)
        check_finite(f"the miss of the reward {self.name}", miss)
        self.keywords, self.min_words = [word.lower() for word in keywords], min_words
        self.hit, self.miss = hit, miss

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        _refuse_hidden(self, "keywords", self.keywords, texts)

    def score_one(self, episode: Episode) -> float:
        text = self.text(episode).lower()
        enough = len(text.split()) >= self.min_words
        return self.hit if enough and any(word in text for word in self.keywords) else self.miss


class BlockedTerms(Reward):
    """Safety term: `penalty` for an episode in which the policy uses a blocked term, else 0.

    Terms match as those of a filter do (`rlhf_lightning.filtering.Terms`): whole words in any case, whatever the white
    space between words and the spelling in Unicode. All of the policy's messages are searched.

    Args:
        terms: The terms.
        file: A text file with one term per line, added to `terms`.
        penalty: Score of an episode with a blocked term, below 0.
        weight: Weight of this term; at 0 it is only logged.
        name: Name for logging.
        skip_special_tokens: If False, responses are read exactly as sampled: with special tokens (`<|im_end|>`), the
            text that ended them, and leading and trailing whitespace.

    Raises:
        ConfigError: If there are no terms, one is empty, the file cannot be read, or `penalty` is not negative.

    Example:
        >>> reward = BlockedTerms(terms=["credit card"])
        >>> reply = [{"role": "assistant", "content": "Send me your credit  card."}]
        >>> reward.score([Episode(prompt=[], row={}, group=0, responses=reply)])
        [-1.0]
    """

    def __init__(
        self,
        terms: list[str] | None = None,
        file: str | None = None,
        penalty: float = -1.0,
        weight: float = 1.0,
        name: str | None = None,
        skip_special_tokens: bool = True,
    ) -> None:
        super().__init__(weight, name)
        self.skip_special_tokens = skip_special_tokens
        check_finite(f"the penalty of the reward {self.name}", penalty)
        if penalty >= 0:
            raise ConfigError(f"the penalty of the reward {self.name} is {penalty}; it must be below 0")
        if isinstance(terms, str):
            raise ConfigError(f"the reward {self.name}: terms is {terms!r}; it must be a list")
        listed = [*(terms or []), *(read_terms(file, f"the reward {self.name}") if file else [])]
        if not listed or not all(isinstance(term, str) and is_term(term) for term in listed):
            raise ConfigError(f"the reward {self.name} needs terms, none of them empty. Set terms or file")
        self.penalty = penalty
        self.terms = listed
        self._search = TermSearch(listed)

    def score_one(self, episode: Episode) -> float:
        return self.penalty if any(self._search.occurs(text) for text in self.texts(episode)) else 0.0

    def check_hidden(self, texts: Sequence[str], rows: Sequence[tuple[Row, str]] = ()) -> None:
        _refuse_hidden(self, "terms", self.terms, texts)


def _refuse_hidden(reward: Reward, setting: str, words: Sequence[str], texts: Sequence[str]) -> None:
    """Reject words that contain a text that is removed from responses."""
    for word in words:
        found = next((text for text in texts if text.lower() in word.lower()), None)
        reward.refuse_hidden(f"{word!r} of its {setting}", found)
