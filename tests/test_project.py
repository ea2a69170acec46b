import torch


def test_fixture_models_run(tiny_model, tiny_tokenizer, device):
    batch = tiny_tokenizer(
        ["monday comes before tuesday .", "the capital"], padding=True, return_tensors="pt"
    ).to(device)
    assert batch.attention_mask.sum(1).tolist() == [5, 2]
    model = tiny_model.to(device)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert logits.shape == (2, 5, len(tiny_tokenizer)) and torch.isfinite(logits).all()
