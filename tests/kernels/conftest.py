from collections.abc import Iterator

import pytest


@pytest.fixture
def gpu_products(monkeypatch) -> Iterator:
    """Let the head compute as on a GPU: half precision weights stay as they are, so dlogits are made in place."""
    from pctrain_kernels import head
    from tests.helpers.triton_cases import GpuProducts

    products = GpuProducts()
    monkeypatch.setattr(head, "operand", lambda tensor: tensor)
    monkeypatch.setattr(head, "product", products.product)
    monkeypatch.setattr(head, "add_product", products.add_product)
    return products
