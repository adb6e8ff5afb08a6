/** Where the rows of single tokens come from, by order of the user: mergekit's `tokenizer.tokens` (merging.md 3.3). */
import type { MergeInput } from '../../artifacts/merge/merge-input.ts';
import type { RowRule } from '../../artifacts/merge/reindexed.ts';
import { RecipeError } from '../../errors.ts';

export type TokenSource =
  | { readonly kind: 'zero' }
  /** The row of the same token in a model, or of another token, by name or by id. */
  | { readonly kind: 'model'; readonly model: string; readonly token?: string | number };

export interface TokenRule {
  /** Absent: as rows of a model that lacks the token are found. */
  readonly source?: TokenSource;
  /** Also for models that have the token. */
  readonly force: boolean;
}

export type TokenRules = Readonly<Record<string, TokenRule>>;

interface TokenModel {
  readonly input: MergeInput;
  readonly ids: ReadonlyMap<string, number>;
  readonly rows: number;
}

/** The model that a label or a path names; `base`: the first. Throws RecipeError, `problem` in front of the labels there are. */
export function modelNamed<T extends { readonly input: MergeInput }>(models: readonly T[], source: string, problem: string): T {
  const found =
    source === 'base' ? models[0] : models.find(({ input: { label, place } }) => label === source || place.path === source);
  if (found) return found;
  throw new RecipeError(`${problem} (${models.map(({ input }) => input.label).join(', ')})`);
}

/** As mergekit names models, by path; by label where no path is meant. */
function sourceModel(models: readonly TokenModel[], source: string, where: string): TokenModel {
  const same = models.find(({ input }) => input.place.path === source);
  const labelled = models.filter(({ input }) => input.label === source);
  if (!same && labelled.length > 1)
    throw new RecipeError(`${where} ${source}: ${labelled.length} models are called so; give a path`);
  return same ?? labelled[0] ?? modelNamed(models, source, `${where} ${source} is not one of the models`);
}

/** By token, the rows it has. Throws RecipeError for a model that is not merged, and for tokens it does not have. */
export function rowRules(rules: TokenRules, models: readonly TokenModel[]): ReadonlyMap<string, RowRule> {
  return new Map(
    Object.entries(rules).map(([token, { source, force }]) => {
      if (source === undefined) return [token, { force }];
      if (source.kind === 'zero') return [token, { force, from: [] }];
      const where = `--config: tokenizer.tokens.${token}:`;
      const model = sourceModel(models, source.model, where);
      const asked = source.token ?? token;
      const row = typeof asked === 'number' ? asked : model.ids.get(asked);
      if (row === undefined || row >= model.rows)
        throw new RecipeError(
          typeof asked === 'number'
            ? `${where} token_id ${asked}: the embedding of ${source.model} has ${model.rows} rows`
            : `${where} ${source.model} has no token ${JSON.stringify(asked)}`,
        );
      return [token, { force, from: [{ model: models.indexOf(model), row }] }];
    }),
  );
}
