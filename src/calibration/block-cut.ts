/** How far a pass over a block has got: what the rest of the block needs of every token, so that it need not be computed again. */
import type { NdArray } from '../compute/engine.ts';
import type { Block, BlockGraph } from '../model/model.ts';
import { type HiddenStates, padRows, type WindowBatch } from './hidden-states.ts';
import type { Spool, StateStore } from './state-store.ts';

/** A wider input than so many hidden states is kept only while there is RAM for it: it is cheaper made again than read from a disk. */
const WIDE = 2;

/** Values of a block's graph at one of its site inputs. */
export class BlockCut {
  readonly block: string;
  readonly input: string;
  /** Graph output -> rows of all tokens, (tokens, features). */
  readonly values: ReadonlyMap<string, StateStore>;
  /** Those of `values` that are still to be filled, batch by batch. */
  readonly fresh: ReadonlyMap<string, StateStore>;

  private constructor(
    block: string,
    input: string,
    values: ReadonlyMap<string, StateStore>,
    fresh: ReadonlyMap<string, StateStore>,
  ) {
    this.block = block;
    this.input = input;
    this.values = values;
    this.fresh = fresh;
  }

  /**
   * Makes room for what follows `input`. Undefined where a cut does not pay: before the first site, or for an input too wide to be kept.
   * @param from the cut that the pass begins at: what is still needed of it is shared
   */
  static at(
    block: Block,
    graph: BlockGraph,
    input: string,
    states: HiddenStates,
    spool: Spool,
    from: BlockCut | undefined,
  ): BlockCut | undefined {
    const { tokenCount, hiddenSize } = states;
    const features = block.sites.find((site) => site.input === input)!.inFeatures;
    const residual = graph.residuals.get(input);
    if (input === block.inputs[0] || residual === undefined) return undefined;
    if (features > WIDE * hiddenSize && !spool.fits(tokenCount, features)) return undefined;
    const fresh = new Map([[graph.siteInputs.get(input)!, spool.allocate(tokenCount, features)]]);
    const kept = from?.values.get(residual);
    // The block's own input is kept as it is anyway.
    if (residual !== 'hidden' && !kept) fresh.set(residual, spool.allocate(tokenCount, hiddenSize));
    return new BlockCut(block.name, input, new Map([...fresh, ...(kept ? [[residual, kept] as const] : [])]), fresh);
  }

  /** Whether a pass over `block` that wants `inputs` may begin here. */
  precedes(block: Block, inputs: readonly string[]): boolean {
    const here = block.inputs.indexOf(this.input);
    return this.block === block.name && inputs.every((input) => block.inputs.indexOf(input) > here);
  }

  /** The batch as the rest of the graph takes it: (batch, sequence, features) by value. */
  async feeds(batch: WindowBatch): Promise<Record<string, NdArray>> {
    const feeds: Record<string, NdArray> = {};
    for (const [name, store] of this.values) {
      const data = padRows(batch, await store.read(batch.rowStart, batch.rowEnd), store.columns);
      feeds[name] = { dtype: 'F32', shape: [batch.lengths.length, batch.sequence, store.columns], data };
    }
    return feeds;
  }

  /** Drops what `next`, if there is one, does not share. */
  async makeWay(next: BlockCut | undefined): Promise<void> {
    const shared = new Set(next?.values.values());
    for (const store of this.values.values()) if (!shared.has(store)) await store[Symbol.asyncDispose]();
  }
}
