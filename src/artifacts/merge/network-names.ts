/** What the tensors of a network are to it: embeddings, output head, matrices stored (in, out). From its architecture, else from names. */
import type { TensorSource } from '../../../formats/tensor.ts';
import { PcompError } from '../../errors.ts';
import type { TensorRole } from '../../methods/merge/merger.ts';
import { createModel } from '../../model/architectures/index.ts';

export interface NetworkNames {
  readonly tokenEmbedding?: string;
  /** The output head's name, whether or not it is stored. */
  readonly head?: string;
  /** Whether the configuration ties head and embedding; undefined: it does not say. */
  readonly tied?: boolean;
  roleOf(name: string, shape: readonly number[]): TensorRole;
  /** Stored (in, out). */
  isTransposed(name: string): boolean;
}

const EMBEDDING =
  /(^|\.)(embed_tokens|wte|wpe|word_embeddings|position_embeddings|token_type_embeddings|embed_in|embed_positions|tok_embeddings|shared)\.weight$/;
const TOKEN_EMBEDDING = /(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|shared)\.weight$/;
const HEAD = /(^|\.)(lm_head|embed_out)\.weight$/;
/** GPT-2's layers, whatever stands before them. */
const CONV1D = /(^|\.)h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj|crossattention\.\w+)\.weight$/;

/** Reads roles off a configuration and the headers of `source`; knows unknown architectures by the usual names. */
export function networkNames(source: TensorSource, config: Readonly<Record<string, unknown>> | undefined): NetworkNames {
  const names = [...source.tensors.keys()];
  const model = config && modelOf(config, source);
  const tokenEmbedding = model?.tokenEmbedding ?? names.find((name) => TOKEN_EMBEDDING.test(name));
  const stored = names.find((name) => HEAD.test(name));
  const configured = config?.['tie_word_embeddings'];
  const tied = model?.shape.tiedEmbeddings ?? (typeof configured === 'boolean' ? configured : undefined);
  const head = stored ?? (tokenEmbedding === undefined ? undefined : 'lm_head.weight');
  const embeddings = new Set([model?.tokenEmbedding, model?.positionEmbedding]);
  const transposed = new Set(
    model?.blocks.flatMap(({ sites }) => sites.filter((site) => site.transposed).map((site) => `${site.name}.weight`)),
  );
  const gpt2 = config === undefined || config['model_type'] === 'gpt2';
  return {
    ...(tokenEmbedding === undefined ? {} : { tokenEmbedding }),
    ...(head === undefined ? {} : { head }),
    ...(tied === undefined ? {} : { tied }),
    roleOf(name, shape) {
      if (name === head) return 'head';
      if (embeddings.has(name) || EMBEDDING.test(name)) return 'embedding';
      return shape.length === 2 || shape.length === 3 ? 'matrix' : 'vector';
    },
    isTransposed: (name) => transposed.has(name) || (model === undefined && gpt2 && CONV1D.test(name)),
  };
}

/** The model, when pcomp knows its architecture; merging needs no more than names. */
function modelOf(config: Readonly<Record<string, unknown>>, source: TensorSource) {
  try {
    return createModel(config, `${source.path} (config.json)`, source);
  } catch (error) {
    if (error instanceof PcompError) return undefined;
    throw error;
  }
}
