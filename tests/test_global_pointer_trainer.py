"""Spans of transformers' Trainer over two processes: counted exactly, whatever batches the texts fall into."""

import os
import socket

import pytest
import torch
import torch.multiprocessing as mp

import fastnlp_ops

TEXTS, H, CHANNELS, MAX_SPANS = 7, 2, 8, 5  # an odd number: the last text is in two batches


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, CHANNELS)
        self.spans = fastnlp_ops.GlobalPointer(CHANNELS, H, 4)

    def forward(self, input_ids, attention_mask, labels):
        hidden = self.embed(input_ids)
        loss = self.spans.loss(hidden, labels, attention_mask)
        found, _ = self.spans.decode(hidden, attention_mask, max_spans=MAX_SPANS)
        return {"loss": loss, "spans": found}


def texts():
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(TEXTS):
        n = 3 + i
        labels = torch.randint(n, (H, 1 + i % 3, 2), generator=generator).sort(-1).values
        found.append({"input_ids": torch.randint(20, (n,), generator=generator), "labels": labels})
    return found


def collate(batch):
    n, most = max(len(text["input_ids"]) for text in batch), 3
    pad = torch.nn.functional.pad
    return {
        "input_ids": torch.stack([pad(x["input_ids"], (0, n - len(x["input_ids"]))) for x in batch]),
        "attention_mask": torch.stack([torch.arange(n) < len(x["input_ids"]) for x in batch]).long(),
        "labels": torch.stack([pad(x["labels"], (0, 0, 0, most - x["labels"].shape[1]), value=-100) for x in batch]),
    }


def count(prediction):
    """Spans found, labelled, and both; a row is a text, whatever batch it was in."""
    counts = torch.zeros(3, dtype=torch.long)
    for spans, labels in zip(prediction.predictions, prediction.label_ids, strict=True):
        found = {tuple(span[1:]) for span in spans.tolist() if span[0] >= 0}
        gold = {(h, *span) for h, head in enumerate(labels.tolist()) for span in head if span[0] >= 0}
        counts += torch.tensor([len(found), len(gold), len(found & gold)])
    return {"counts": counts.tolist()}


def evaluate(folder):
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    arguments = TrainingArguments(
        str(folder), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True, label_names=["labels"]
    )
    data = texts()
    trainer = Trainer(Model(), arguments, data_collator=collate, eval_dataset=data, compute_metrics=count)
    return trainer.evaluate()["eval_counts"]


def work(rank, world, folder, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    counts = evaluate(folder)
    assert torch.distributed.get_world_size() == world
    (folder / f"counts-{rank}").write_text(str(counts))
    torch.distributed.destroy_process_group()


def test_trainer_over_two_processes(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    model, expected = Model(), torch.zeros(3, dtype=torch.long)
    for text in texts():
        spans, scores = model.spans.decode(model.embed(text["input_ids"][None]))
        best = spans[scores.sort(descending=True, stable=True).indices[:MAX_SPANS]]
        found = {tuple(span[1:]) for span in best.tolist()}
        gold = {(h, *span) for h, head in enumerate(text["labels"].tolist()) for span in head}
        expected += torch.tensor([len(found), len(gold), len(found & gold)])
    assert expected.min() > 0, "no text of which all counts are 0"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (2, tmp_path, port), nprocs=2)
    assert [(tmp_path / f"counts-{rank}").read_text() for rank in range(2)] == [str(expected.tolist())] * 2
