/** From logits to numbers: negative log-likelihood, KL divergence, top-1 agreement; sums in float64. */

export interface Score {
  /** Scored tokens. */
  readonly tokens: number;
  /** Mean negative log-likelihood, nats per scored token. */
  readonly nll: number;
  readonly perplexity: number;
}

export interface Comparison {
  /** Mean KL(original || artifact), nats per scored token. */
  readonly kl: number;
  /** Share of scored tokens where both rank the same token first. */
  readonly top1Agreement: number;
  /** Perplexity over the original's. */
  readonly perplexityRatio: number;
}

interface RowStats {
  /** log sum exp of the row. */
  logSum: number;
  argmax: number;
}

function rowStats(logits: Float32Array, start: number, width: number): RowStats {
  let max = Number.NEGATIVE_INFINITY;
  let argmax = 0;
  for (let i = 0; i < width; i++) {
    const value = logits[start + i];
    if (value > max) {
      max = value;
      argmax = i;
    }
  }
  let sum = 0;
  for (let i = 0; i < width; i++) sum += Math.exp(logits[start + i] - max);
  return { logSum: max + Math.log(sum), argmax };
}

/** Accumulates scores over rows of logits (rows, vocabSize), each with the token that really came next. */
export class Scorer {
  #tokens = 0;
  #nll = 0;
  #kl = 0;
  #agreed = 0;
  #originalNll = 0;

  /** `original`, when given, holds the reference model's logits of the same rows. */
  add(logits: Float32Array, targets: ArrayLike<number>, vocabSize: number, original?: Float32Array): void {
    for (let row = 0; row < targets.length; row++) {
      const start = row * vocabSize;
      const own = rowStats(logits, start, vocabSize);
      this.#tokens++;
      this.#nll += own.logSum - logits[start + targets[row]];
      if (original === undefined) continue;
      const reference = rowStats(original, start, vocabSize);
      if (reference.argmax === own.argmax) this.#agreed++;
      this.#originalNll += reference.logSum - original[start + targets[row]];
      let kl = 0;
      for (let i = start; i < start + vocabSize; i++) {
        const logP = original[i] - reference.logSum;
        kl += Math.exp(logP) * (logP - (logits[i] - own.logSum));
      }
      this.#kl += kl;
    }
  }

  get score(): Score {
    const nll = this.#nll / this.#tokens;
    return { tokens: this.#tokens, nll, perplexity: Math.exp(nll) };
  }

  get comparison(): Comparison {
    return {
      kl: this.#kl / this.#tokens,
      top1Agreement: this.#agreed / this.#tokens,
      perplexityRatio: Math.exp((this.#nll - this.#originalNll) / this.#tokens),
    };
  }
}
