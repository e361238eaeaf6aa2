"""Which alpha and dropout LoRA and its relatives take, from a caller or from a file."""

from qlora_lab.quant.numbers import check_number


def check_strength(alpha: float, dropout: float) -> None:
    """Raise ValueError unless 0 < alpha <= 1,000,000 and 0 <= dropout < 1."""
    check_alpha("alpha", alpha)
    check_dropout("dropout", dropout)


def check_alpha(name: str, alpha: float) -> None:
    check_number(name, alpha, lambda a: 0 < a <= 1e6, "a number above 0 and at most 1,000,000, usually r or 16")


def check_dropout(name: str, dropout: float) -> None:
    check_number(name, dropout, lambda share: 0 <= share < 1, "a number from 0 to below 1, usually 0 to 0.1")
