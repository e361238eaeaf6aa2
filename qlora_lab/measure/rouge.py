"""ROUGE-L: how much of a reference's word order an answer keeps.

In: answers and references, texts. Out: one F-measure in [0, 1] each, by the `rouge-score` package (Lin 2004, "ROUGE:
A Package for Automatic Evaluation of Summaries", section 3.1): the longest common subsequence of words over the
answer's length (precision) and over the reference's (recall), and the harmonic mean of both.

Words are compared in lower case, without punctuation and without stemming: "return" and "returns" differ, as they do
in the package's default. Numbers with and without stemming cannot be compared.

Not here: where the answers come from (held_out.py).
"""


def rouge_l(predictions: list[str], references: list[str]) -> list[float]:
    """ROUGE-L F-measure of each pair; an empty text scores 0. Raises ValueError if the lists differ in length.

    >>> rouge_l(["the cat sat"], ["the cat"])  # common: 2 words; 2/3 of the answer, 2/2 of the reference
    [0.8]
    """
    from rouge_score.rouge_scorer import RougeScorer  # 1 s, for NLTK

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: give one for each")
    scorer = RougeScorer(["rougeL"])
    pairs = zip(predictions, references, strict=True)
    return [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for prediction, reference in pairs]
