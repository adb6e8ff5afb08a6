/** What became of the vocabularies of models that were merged. */
import type { RowOrigin } from '../../artifacts/merge/reindexed.ts';
import type { UnitedVocabulary } from '../../artifacts/merge/vocabulary.ts';
import { parseTextFile, readText } from '../../calibration/text.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import type { OpenModel, VocabularyRequest } from './vocabulary.ts';

/** A token whose row in a model is another's. */
interface FilledToken {
  readonly token: string;
  /** Models; several: the mean of their rows, none: zeros. */
  readonly from: readonly string[];
}

/** What became of the vocabularies: for people and for pcomp.json. */
export interface VocabularyReport {
  readonly source: string;
  readonly rows: number;
  /** Tokens that the base lacks, in the order of their ids, and who had them first: a model, or `tokenizer.tokens`. */
  readonly appended: readonly { readonly token: string; readonly id: number; readonly from: string }[];
  /** By model: tokens that it lacks, and where their rows come from. */
  readonly missing: Readonly<Record<string, readonly FilledToken[]>>;
  /** By model: tokens that it has, and whose rows are other ones, as the configuration orders. */
  readonly forced: Readonly<Record<string, readonly FilledToken[]>>;
  /** By model: tokens it has that the result does not. */
  readonly dropped: Readonly<Record<string, readonly string[]>>;
  /** Added tokens that models define differently; the first definition holds. */
  readonly conflicts: readonly string[];
  /** Part of the tokens of the calibration text that come out otherwise than before, where there is one. */
  readonly changedTokens?: number;
}

/** Who has a token first that no model has. */
const ASKED = 'tokenizer.tokens';
/** Tokens that a line on the terminal names. */
const NAMED = 10;
/** Characters of text that are cut both ways. */
const COMPARED = 20_000;

interface Unified {
  readonly models: readonly OpenModel[];
  readonly united: UnitedVocabulary;
  /** By model. */
  readonly origins: readonly (readonly RowOrigin[])[];
  /** By id. */
  readonly tokens: readonly (string | undefined)[];
  readonly request: VocabularyRequest;
  /** The folder that has it. */
  readonly tokenizer: string;
  readonly rows: number;
}

export async function vocabularyReport(unified: Unified): Promise<VocabularyReport> {
  const { models, origins, tokens, tokenizer, rows } = unified;
  const { appended, conflicts, ids } = unified.united;
  const { source, calibration } = unified.request;
  const label = (model: number) => models[model].input.label;
  const missing = new Map<string, FilledToken[]>();
  const forced = new Map<string, FilledToken[]>();
  const dropped = new Map<string, string[]>();
  for (const [own, list] of origins.entries()) {
    const { ids: had, rows: ownRows } = models[own];
    for (const [id, origin] of list.entries()) {
      const token = tokens[id];
      if (origin.kind !== 'filled' || token === undefined) continue;
      const kind = (had.get(token) ?? ownRows) < ownRows ? forced : missing;
      const tokensOfKind = kind.get(label(own)) ?? [];
      tokensOfKind.push({ token, from: origin.from.map(({ model }) => label(model)) });
      kind.set(label(own), tokensOfKind);
    }
    const lost = [...had].filter(([token, id]) => id < ownRows && !ids.has(token)).map(([token]) => token);
    if (lost.length > 0) dropped.set(label(own), lost);
  }
  const changedTokens = await changedPart(models[0], tokenizer, rows, calibration);
  return {
    source,
    rows,
    appended: appended.map(({ token, id, model }) => ({ token, id, from: model === undefined ? ASKED : label(model) })),
    missing: Object.fromEntries(missing),
    forced: Object.fromEntries(forced),
    dropped: Object.fromEntries(dropped),
    conflicts,
    ...(changedTokens === undefined ? {} : { changedTokens }),
  };
}

/** Part of the tokens that the new tokenizer does not share with the base's at the same place from the start or from the end. */
async function changedPart(
  base: OpenModel,
  tokenizer: string,
  rows: number,
  calibration: readonly string[],
): Promise<number | undefined> {
  if (calibration.length === 0 || tokenizer === base.folder) return undefined;
  const files = calibration.map((argument) => parseTextFile(argument.slice(argument.indexOf('=') + 1)));
  const text = await readText(files, COMPARED);
  const [before, after] = [await loadTokenizer(base.folder, base.rows), await loadTokenizer(tokenizer, rows)];
  const lines = text.split('\n');
  let [changed, total] = [0, 0];
  for (const line of lines) {
    const [a, b] = [before.encode(line), after.encode(line)];
    total += a.length;
    if (a.join() !== b.join()) changed += a.length;
  }
  return total === 0 ? 0 : changed / total;
}

export function describeVocabulary(report: VocabularyReport): string[] {
  const { source, rows, appended, missing, forced, dropped, conflicts, changedTokens } = report;
  const some = (tokens: readonly string[]) =>
    `${tokens
      .slice(0, NAMED)
      .map((token) => JSON.stringify(token))
      .join(', ')}${tokens.length > NAMED ? ', ...' : ''}`;
  const notes = [`one vocabulary (${source}): ${rows} rows`];
  if (appended.length > 0)
    notes.push(`${appended.length} tokens that the base lacks: ${some(appended.map(({ token }) => token))}`);
  const filled = (tokens: readonly FilledToken[]) =>
    `whose rows are from ${[...new Set(tokens.flatMap(({ from }) => (from.length === 0 ? ['zeros'] : from)))].join(', ')}: ${some(tokens.map(({ token }) => token))}`;
  for (const [label, tokens] of Object.entries(missing)) notes.push(`${label} lacks ${tokens.length} tokens, ${filled(tokens)}`);
  for (const [label, tokens] of Object.entries(forced))
    notes.push(`${label} has ${tokens.length} tokens of its own, ${filled(tokens)}`);
  for (const [label, tokens] of Object.entries(dropped))
    notes.push(`${tokens.length} tokens of ${label} are left out: ${some(tokens)}`);
  if (conflicts.length > 0) notes.push(`defined differently, as the first model has them: ${some(conflicts)}`);
  if (changedTokens !== undefined)
    notes.push(
      `${(100 * changedTokens).toFixed(1)} % of the tokens of the calibration text are in lines that are cut otherwise now`,
    );
  return notes;
}
