"""Score answers by ROUGE-L: how much of a reference's word order an answer keeps.

In: answers and references, texts. Out: one F-measure in [0, 1] for each, by the `rouge-score` package (Lin 2004,
"ROUGE: A Package for Automatic Evaluation of Summaries", section 3.1). Precision is the longest common subsequence of
words over the answer's length, recall the same over the reference's, and the F-measure their harmonic mean.

Words are compared in lower case, without punctuation and without stemming: "return" and "returns" differ, as in the
package's default. Do not compare figures with and without stemming.
"""


def rouge_l(predictions: list[str], references: list[str]) -> list[float]:
    """Return the ROUGE-L F-measure of each pair; an empty text scores 0. Raises ValueError if the lengths differ."""
    from rouge_score.rouge_scorer import RougeScorer  # takes 1 s, mostly NLTK

    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions but {len(references)} references: give one for each")
    scorer = RougeScorer(["rougeL"])  # without stemming
    pairs = zip(predictions, references, strict=True)
    return [float(scorer.score(reference, prediction)["rougeL"].fmeasure) for prediction, reference in pairs]
