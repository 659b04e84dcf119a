"""Train a GRU on cached item embeddings and rank with it: python own_model.py NAME."""

import sys

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hsft
from hsft.data.dataset import TrainCollate
from hsft.evaluator.evaluator import EvalProtocol
from hsft.model.item_table import table_from_cache


class GRU(hsft.SequenceEncoder):
    """State t of a GRU has read the vectors of items 0..t."""

    def __init__(self, items: hsft.ItemTable) -> None:
        super().__init__()
        self.items = items
        self.gru = nn.GRU(items.dim, items.dim, batch_first=True)

    def forward(self, history: Tensor, positions: Tensor | None = None) -> Tensor:
        states: Tensor = self.gru(self.items(history))[0]
        return states


name = sys.argv[1]
torch.manual_seed(2020)
interactions = hsft.read_interactions(f"dataset/{name}.csv")
split = hsft.leave_one_out(interactions)
cache = hsft.open_cache(f"dataset/{name.lower()}_item_embeddings.safetensors")
table = hsft.ItemTable(
    table_from_cache(cache, interactions.item_ids, "standardize"), "linear"
)  # [I + 1, D], row 0 the padding item
settings = hsft.LossSettings("nce", "catalogue", 0.99, budget_bytes=1 << 28, similarity="cosine")
model = hsft.Recommender(GRU(table), settings)

dataset = hsft.CachedEmbeddingTrainDataset(split, max_length=20)
loader = DataLoader(dataset, batch_size=32, shuffle=True, collate_fn=TrainCollate(dataset))
protocol = EvalProtocol("full", topk=(10,), metrics=("Recall", "NDCG"))
users = hsft.CachedEmbeddingEvalDataset(split, "valid", max_length=20)
evaluator = hsft.Evaluator(users, protocol, batch_size=256)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(1, 6):
    for batch in loader:
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
    model.eval()
    print(epoch, evaluator.run(model, torch.device("cpu")).metrics)
    model.train()
