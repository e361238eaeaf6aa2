"""The hints for the exercises of notebook 14, in the form that hints.py describes."""

WITHOUT = {
    "my_leak": ("data.shapes.is_held_out",),
}


def my_picture(size, patch, layers, kv_heads, head_dim):
    """How many patches lie in a row, and how many rows are there? What does each layer keep for one token?"""
    row = size // patch
    # numbers that one layer keeps of one token: keys and values
    kept = 2 * kv_heads * head_dim
    right = row * row, 2 * row * row * layers * kept
    yield (row, 2 * row * layers * kept), "That is one row of patches. How many rows has a picture?"
    yield (size * size, 2 * size * size * layers * kept), "A token stands for a patch, not for a pixel."
    yield (row * row + 1, right[1] // (row * row) * (row * row + 1)), "LLaVA leaves the tower's class token out."
    # the tokens are right from here on, and the bytes are not
    yield (right[0], right[1] // 2), "Half of it is missing: the keys, the values, or one of two bytes."
    yield (right[0], right[1] // layers), "That is what one layer keeps. Does each layer have keys of its own?"
    yield (right[0], right[1] // kv_heads), "That is one head. How many heads have keys and values?"
    yield (right[0], 2 * right[1]), "Twice too much. How many bytes has a number in bf16?"
    yield right[::-1], "Return the tokens first, then the bytes."


def my_saving(counts, part):
    """Add up all bytes before: 2 for each weight of 16 bits, 4.127 / 8 for each packed one. What changes?"""
    packed = 4.127 / 8
    saved = counts[part] * (2 - packed)
    # the language model is in 4 bits already, so it is smaller than it looks
    before = sum(n * (packed if name == "language" else 2) for name, n in counts.items())
    everything = sum(counts.values())
    yield 100 * saved / (2 * everything), "You start with a language model of 16 bits. What is it stored in here?"
    yield 100 * counts[part] / everything, "That is its share of the weights. A weight of 16 bits costs more bytes."
    yield 100 * 2 * counts[part] / before, "That is its share of the bytes. Packed, it still takes some of them."
    # the right ratio, told in another way
    yield saved / before, "That is a share. How many percent is it?"
    yield 100 * saved / (before - saved), "You divide by the bytes afterwards. Of what is it a saving?"
    yield 100 * (before - saved) / before, "That is what is left. How much is gone?"
    yield saved, "These are bytes. How many percent of all bytes before are they?"


def my_leak(train, test):
    """Collect the pairs of training in a set, and look up each pair of the test in it."""
    # a scene is a tuple: colour first, then shape
    learned = {scene[:2] for scene in train}
    tested = {scene[:2] for scene in test}
    yield sorted(tested - learned), "These are new to the model, as they should be. Which ones are not?"
    yield sorted(learned - tested), "These are in training alone. Which pairs have both?"
    yield sorted(learned | tested), "These are all pairs. Which ones occur in both lists?"
    whole = {tuple(scene) for scene in train}
    yield (
        sorted({scene[:2] for scene in test if tuple(scene) in whole}),
        "You compare whole scenes. A pair leaks although the number of shapes is another.",
    )
    found = [scene[:2] for scene in test if scene[:2] in learned]
    yield found, "Each pair once, in order: what makes a set, and what sorts it?"
    yield len(learned & tested), "That is their number. Which pairs are they?"
    colours = {scene[0] for scene in train}
    yield sorted({scene[:2] for scene in test if scene[0] in colours}), "You look at colours alone. Pairs leak."
