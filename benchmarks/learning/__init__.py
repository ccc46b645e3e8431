"""Does it learn what it should? Tasks with a known optimum, and what happens when a reward is pressed too hard."""
