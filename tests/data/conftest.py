import pytest
from tokenizers import Tokenizer

from mhmoe_np.data.tokenizer import train_tokenizer
from tests.documents import embedded_documents


@pytest.fixture(scope="session")
def documents() -> tuple[str, ...]:
    return embedded_documents()["lexicon"].documents[:40]


@pytest.fixture(scope="session")
def tokenizer(documents: tuple[str, ...]) -> Tokenizer:
    return train_tokenizer(documents, vocab_size=500)
