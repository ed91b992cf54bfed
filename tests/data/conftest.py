import pytest
from tokenizers import Tokenizer

from mhmoe_np.data.documents import embedded_domains
from mhmoe_np.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def documents() -> tuple[str, ...]:
    return embedded_domains()[2].documents[:40]


@pytest.fixture(scope="session")
def tokenizer(documents: tuple[str, ...]) -> Tokenizer:
    return train_tokenizer(documents, vocab_size=500)
