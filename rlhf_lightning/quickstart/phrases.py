"""Phrases of which the quickstart's conversations are composed."""

# fmt: off
ADJECTIVES = [
    "old", "small", "noisy", "rusty", "heavy", "broken", "dusty", "cheap", "wet",
    "loose", "bent", "cold", "dirty", "cracked", "sticky", "slow", "stiff", "faded",
]
# fmt: on

THINGS = {
    "metal": ["bicycle", "fence", "ladder", "gate", "mower", "shovel", "anchor", "kettle"],
    "wood": ["chair", "door", "shelf", "table", "bench", "drawer", "cabinet", "crate"],
    "cloth": ["jacket", "tent", "curtain", "sail", "blanket", "backpack", "sofa", "rug"],
    "electric": ["lamp", "radio", "heater", "printer", "fan", "toaster", "camera", "drill"],
}

STEPS = {
    "metal": (
        "rub off the rust with steel wool",
        "put a drop of oil on every joint",
        "tighten all the bolts with a wrench",
        "wipe the bare metal dry",
    ),
    "wood": (
        "sand the rough spots along the grain",
        "glue the split and clamp it overnight",
        "rub some wax into the surface",
        "tap the pegs back into place",
    ),
    "cloth": (
        "brush off the dirt and let it air",
        "sew the torn seam with strong thread",
        "wash it by hand in cool water",
        "patch the hole from the inside",
    ),
    "electric": (
        "unplug it and look at the cord",
        "blow the dust out of the vents",
        "replace the fuse with a new one",
        "clean the contacts with a dry cloth",
    ),
}

QUESTIONS = (
    "How do I fix my {}?",
    "What should I do about my {}?",
    "My {} gives me trouble. Any advice?",
    "Can you help me with my {}?",
    "I want to use my {} again. Where do I start?",
    "Is there hope for my {}?",
)

NAMED = (
    "Here is what I would do with the {}.",
    "Let us take care of the {}.",
    "The {} can be put right.",
    "You can save the {} yourself.",
)

UNNAMED = (
    "Here is what I would do.",
    "Let us take care of that.",
    "That can be put right.",
    "You can do this yourself.",
)

VAGUE = (
    "There are many things you could try.",
    "It all depends on the details.",
    "Some people do one thing and some do another.",
)

REASONS = (
    "This helps because small faults grow when they are left alone.",
    "It works because most trouble starts at the surface.",
    "Do it soon, because waiting makes the repair cost more.",
    "That is enough, because the rest is usually sound.",
)

CAUTIONS = (
    "Before you begin, make sure you have good light.",
    "Be careful not to force anything.",
    "Make sure nobody uses it in the meantime.",
    "Wear gloves and be careful with sharp edges.",
)

FILLERS = (
    "Thank you for this interesting question.",
    "I am always happy to talk about such things.",
    "I hope that this is of some use to you.",
    "Please feel free to ask me anything else.",
)
