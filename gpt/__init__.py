"""A GPT on minitensor: text, tokens, model, training loop, checkpoints and sampling.

A run's folder holds, beside its report, curves and sample,

    checkpoint.safetensors   the run as it was last saved: model, optimizer, random numbers and progress
    best.safetensors         the same, as it was at the lowest validation loss
    metrics.jsonl            one JSON object a line for each evaluation, with these numbers:

        step            steps done
        batch_loss      mean loss of the batches since the last evaluation, as trained on (with dropout)
        train_loss      loss over a fixed part of the training split, its first 65,536 tokens or all of them
        val_loss        loss over the whole validation split, every token but the first, by the same method
        val_bits        val_loss in bits
        lr              learning rate of the last step
        gradient_norm   mean norm of the gradients since the last evaluation, before clipping
        seconds         time spent on the run, over all its parts if it was resumed
        tokens_per_s    speed of the steps since the last evaluation

    Losses are in nats a token, and a token is a character. All but the last two are the same bits in a run
    that was stopped and resumed (but under --minutes, where the clock has its say).

Exit codes: 0 done, or stopped where --stop-after says; 2 bad input; 3 diverged; 130 interrupted.
"""
