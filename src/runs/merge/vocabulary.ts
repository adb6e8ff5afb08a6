/** One vocabulary for all models of a merge: their embeddings and heads brought into its order, and its tokenizer (merging.md 3.3). */
import { copyFile, mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { copyModelFiles } from '../../artifacts/copied-files.ts';
import { type MergeInput, readJsonObject } from '../../artifacts/merge/merge-input.ts';
import { networkNames } from '../../artifacts/merge/network-names.ts';
import {
  isUnchanged,
  OverlaidSource,
  type Reindexing,
  type RowOrigin,
  rowOrigins,
  type TokenTable,
  writeReindexed,
} from '../../artifacts/merge/reindexed.ts';
import { StackedSource } from '../../artifacts/merge/stacked-source.ts';
import {
  readVocabulary,
  type UnitedVocabulary,
  unitedTokenizer,
  uniteVocabularies,
  type Vocabulary,
} from '../../artifacts/merge/vocabulary.ts';
import { parseTextFile, readText } from '../../calibration/text.ts';
import { loadTokenizer } from '../../calibration/tokenizer.ts';
import { RecipeError } from '../../errors.ts';

/** What became of the vocabularies: for people and for pcomp.json. */
export interface VocabularyReport {
  readonly source: string;
  readonly rows: number;
  /** Tokens that the base lacks, in the order of their ids, and who had them first. */
  readonly appended: readonly { readonly token: string; readonly id: number; readonly from: string }[];
  /** By model: tokens that it lacks, and where their rows come from. */
  readonly missing: Readonly<Record<string, readonly { readonly token: string; readonly from: readonly string[] }[]>>;
  /** By model: tokens it has that the result does not. */
  readonly dropped: Readonly<Record<string, readonly string[]>>;
  /** Added tokens that models define differently; the first definition holds. */
  readonly conflicts: readonly string[];
  /** Part of the tokens of the calibration text that come out otherwise than before, where there is one. */
  readonly changedTokens?: number;
}

export interface OneVocabulary {
  readonly experts: readonly MergeInput[];
  readonly base: MergeInput | undefined;
  /** Where the tokenizer of the result is. */
  readonly folder: string;
  readonly report: VocabularyReport;
  readonly notes: readonly string[];
  dispose(): Promise<void>;
}

export interface VocabularyRequest {
  /** `union`, or the label of a model, or its path. */
  readonly source: string;
  /** Rows are a multiple of it; 1: as many as there are. */
  readonly multiple: number;
  /** Texts to count changed tokens on: `label=FILE` or a file. */
  readonly calibration: readonly string[];
}

/** Tokens that a line on the terminal names. */
const NAMED = 10;
/** Characters of text that are cut both ways. */
const COMPARED = 20_000;

/**
 * Writes embeddings and heads in the order of one vocabulary to temporary files, where a model's own order is another. Throws RecipeError for a model
 * without a tokenizer or of other width, and for adapters, which have none of their own.
 */
export async function withOneVocabulary(
  experts: readonly MergeInput[],
  base: MergeInput | undefined,
  request: VocabularyRequest,
): Promise<OneVocabulary> {
  const inputs = base ? [base, ...experts] : [...experts];
  const full = inputs.filter(({ adapter }) => adapter === undefined);
  if (request.source !== 'union') chosen(full, request.source);
  const models = await Promise.all(full.map(openModel));
  const united = await vocabularyOf(models, request);
  const template = models[0];
  const highest = Math.max(...[...united.ids.values()]) + 1;
  const least = Math.max(request.source === 'union' ? template.rows : 0, highest);
  const rows = Math.ceil(least / request.multiple) * request.multiple;
  const tokens = new Array<string | undefined>(rows).fill(undefined);
  for (const [token, id] of united.ids) tokens[id] = token;

  const folder = await mkdtemp(join(tmpdir(), 'pcomp-vocabulary-'));
  const made: OverlaidSource[] = [];
  const dispose = async () => {
    for (const source of made) await source.close();
    await rm(folder, { recursive: true, force: true });
  };
  try {
    const origins = models.map((_, own) => rowOrigins(own, tokens, models));
    const replaced = new Map<MergeInput, MergeInput>();
    for (const [own, model] of models.entries()) {
      const { input } = model;
      const config = input.config && { ...input.config, vocab_size: rows };
      const same = isUnchanged(origins[own], model.rows);
      if (!same && input.tensors instanceof StackedSource)
        throw new RecipeError(
          `--config: ${input.label} is put together of slices, and its vocabulary would have to change; merge whole models`,
        );
      if (!same) {
        const path = join(folder, `vocabulary-${own}.safetensors`);
        await writeReindexed(path, tablesOf(models, own, origins[own]));
        made.push(await OverlaidSource.open(input.tensors, path));
      }
      const tensors = same ? input.tensors : made.at(-1)!;
      replaced.set(input, { ...input, tensors, ...(config ? { config } : {}) });
    }
    const touched = inputs.find(({ adapter, tensors }) => adapter && [...tensors.tensors.keys()].some(isTable));
    if (touched && !isUnchanged(origins[0], template.rows))
      throw new RecipeError(
        `--tokenizer ${request.source}: ${touched.place.path} is an adapter that changes the embedding or the head, whose rows move; fold it in first (adapt convert --to merged)`,
      );
    const tokenizer = await writeTokenizer(folder, models, united, request);
    const report = await reportOf(models, united, origins, tokens, request, tokenizer, rows);
    const of = (input: MergeInput) => replaced.get(input) ?? input;
    return {
      experts: experts.map(of),
      base: base && of(base),
      folder: tokenizer,
      report,
      notes: describe(report),
      dispose,
    };
  } catch (error) {
    await dispose();
    throw error;
  }
}

interface OpenModel {
  readonly input: MergeInput;
  readonly folder: string;
  readonly vocabulary: Vocabulary;
  readonly ids: ReadonlyMap<string, number>;
  /** Of the embedding. */
  readonly rows: number;
  readonly columns: number;
  /** Embedding, and head where it is stored. */
  readonly tables: readonly { readonly role: 'embedding' | 'head'; readonly name: string }[];
}

async function openModel(input: MergeInput): Promise<OpenModel> {
  const { place, tensors, config } = input;
  const folder = place.kind === 'folder' ? place.path : dirname(place.path);
  const vocabulary = await readVocabulary(folder);
  if (!vocabulary)
    throw new RecipeError(`${place.path}: has no tokenizer.json beside it, which --tokenizer needs of every model`);
  const names = networkNames(tensors, config);
  const embedding = names.tokenEmbedding;
  const shape = embedding === undefined ? undefined : tensors.tensors.get(embedding)?.shape;
  if (embedding === undefined || shape?.length !== 2)
    throw new RecipeError(`${place.path}: has no embedding that pcomp knows by name, which --tokenizer needs`);
  const { head } = names;
  const stored = head !== undefined && tensors.tensors.has(head) && head !== embedding;
  const headRows = stored ? tensors.tensors.get(head)!.shape[0] : shape[0];
  if (headRows !== shape[0])
    throw new RecipeError(`${place.path}: its embedding has ${shape[0]} rows, and its output head ${headRows}`);
  return {
    input,
    folder,
    vocabulary,
    ids: vocabulary.ids,
    rows: shape[0],
    columns: shape[1],
    tables: [{ role: 'embedding', name: embedding }, ...(stored ? [{ role: 'head', name: head } as const] : [])],
  };
}

async function vocabularyOf(models: readonly OpenModel[], { source }: VocabularyRequest): Promise<UnitedVocabulary> {
  const [first] = models;
  const other = models.find(({ columns }) => columns !== first.columns);
  if (other)
    throw new RecipeError(
      `${other.input.place.path}: its embedding has ${other.columns} columns, and the base's ${first.columns}`,
    );
  const rows = models.map((model) => model.rows);
  if (source === 'union')
    return uniteVocabularies(
      models.map(({ vocabulary }) => vocabulary),
      rows,
    );
  const input = chosen(
    models.map((model) => model.input),
    source,
  );
  const { vocabulary } = models.find((model) => model.input === input)!;
  return { ids: vocabulary.ids, appended: [], conflicts: [] };
}

function chosen(inputs: readonly MergeInput[], source: string): MergeInput {
  const found = source === 'base' ? inputs[0] : inputs.find(({ label, place }) => label === source || place.path === source);
  if (found) return found;
  const known = inputs.map(({ label }) => label).join(', ');
  throw new RecipeError(`--tokenizer ${source}: is neither union nor one of the models (${known})`);
}

/** A head of a model that ties it is its embedding. */
function tablesOf(models: readonly OpenModel[], own: number, origins: readonly RowOrigin[]): Reindexing[] {
  return models[own].tables.map(({ role }) => ({
    own,
    origins,
    tables: models.map(({ input, ids, tables }): TokenTable => {
      const { name } = tables.find((table) => table.role === role) ?? tables[0];
      return { source: input.tensors, name, ids };
    }),
  }));
}

function isTable(name: string): boolean {
  return /(embed_tokens|wte|lm_head|embed_in|embed_out|word_embeddings)/.test(name);
}

/** Puts the result's tokenizer, and what is copied with it, into a folder; returns that. */
async function writeTokenizer(
  folder: string,
  models: readonly OpenModel[],
  united: UnitedVocabulary,
  { source }: VocabularyRequest,
): Promise<string> {
  const inputs = models.map(({ input }) => input);
  const from = source === 'union' ? models[0] : models[inputs.indexOf(chosen(inputs, source))];
  if (united.appended.length === 0 && source !== 'union') return from.folder;
  await copyModelFiles(from.folder, folder);
  try {
    await copyFile(join(models[0].folder, 'generation_config.json'), join(folder, 'generation_config.json'));
  } catch {
    // There is none.
  }
  if (united.appended.length === 0) return folder;
  const json = unitedTokenizer(from.vocabulary, united);
  await writeFile(join(folder, 'tokenizer.json'), `${JSON.stringify(json, null, 2)}\n`);
  const path = join(folder, 'tokenizer_config.json');
  const config = (await exists(path)) ? await readJsonObject(path) : {};
  const decoder = config['added_tokens_decoder'];
  const known = typeof decoder === 'object' && decoder !== null ? decoder : undefined;
  if (!known) return folder;
  const tokens = (json['added_tokens'] as { id: number }[]).map(({ id, ...token }) => [id, token] as const);
  await writeFile(path, `${JSON.stringify({ ...config, added_tokens_decoder: Object.fromEntries(tokens) }, null, 2)}\n`);
  return folder;
}

async function exists(path: string): Promise<boolean> {
  try {
    await stat(path);
    return true;
  } catch {
    return false;
  }
}

async function reportOf(
  models: readonly OpenModel[],
  { appended, conflicts, ids }: UnitedVocabulary,
  origins: readonly (readonly RowOrigin[])[],
  tokens: readonly (string | undefined)[],
  { source, calibration }: VocabularyRequest,
  tokenizer: string,
  rows: number,
): Promise<VocabularyReport> {
  const label = (model: number) => models[model].input.label;
  const missing: Record<string, { token: string; from: string[] }[]> = {};
  const dropped: Record<string, string[]> = {};
  for (const [own, list] of origins.entries()) {
    const lacking = list.flatMap((origin, id) => {
      const token = tokens[id];
      return origin.kind === 'filled' && token !== undefined
        ? [{ token, from: origin.from.map(({ model }) => label(model)) }]
        : [];
    });
    if (lacking.length > 0) missing[label(own)] = lacking;
    const lost = [...models[own].ids].filter(([token, id]) => id < models[own].rows && !ids.has(token)).map(([token]) => token);
    if (lost.length > 0) dropped[label(own)] = lost;
  }
  const changedTokens = await changedPart(models[0], tokenizer, rows, calibration);
  return {
    source,
    rows,
    appended: appended.map(({ token, id, model }) => ({ token, id, from: label(model) })),
    missing,
    dropped,
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

function describe({ source, rows, appended, missing, dropped, conflicts, changedTokens }: VocabularyReport): string[] {
  const some = (tokens: readonly string[]) =>
    `${tokens
      .slice(0, NAMED)
      .map((token) => JSON.stringify(token))
      .join(', ')}${tokens.length > NAMED ? ', ...' : ''}`;
  const notes = [`one vocabulary (${source}): ${rows} rows`];
  if (appended.length > 0)
    notes.push(`${appended.length} tokens that the base lacks: ${some(appended.map(({ token }) => token))}`);
  for (const [label, tokens] of Object.entries(missing)) {
    const sources = [...new Set(tokens.flatMap(({ from }) => from))].join(', ') || 'zeros';
    notes.push(
      `${label} lacks ${tokens.length} tokens, whose rows are from ${sources}: ${some(tokens.map(({ token }) => token))}`,
    );
  }
  for (const [label, tokens] of Object.entries(dropped))
    notes.push(`${tokens.length} tokens of ${label} are left out: ${some(tokens)}`);
  if (conflicts.length > 0) notes.push(`defined differently, as the first model has them: ${some(conflicts)}`);
  if (changedTokens !== undefined)
    notes.push(
      `${(100 * changedTokens).toFixed(1)} % of the tokens of the calibration text are in lines that are cut otherwise now`,
    );
  return notes;
}
