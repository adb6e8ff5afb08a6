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
  firstFree,
  readVocabulary,
  type UnitedVocabulary,
  unitedTokenizer,
  uniteVocabularies,
  type Vocabulary,
  withTokens,
} from '../../artifacts/merge/vocabulary.ts';
import { RecipeError } from '../../errors.ts';
import { modelNamed, rowRules, type TokenRules } from './token-rules.ts';
import { describeVocabulary, type VocabularyReport, vocabularyReport } from './vocabulary-report.ts';

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
  /** Where the rows of single tokens come from. */
  readonly rules: TokenRules;
  /** Texts to count changed tokens on: `label=FILE` or a file. */
  readonly calibration: readonly string[];
}

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
  const full = inputs.filter(({ adapter }) => adapter === undefined).map((input) => ({ input }));
  if (request.source !== 'union') chosen(full, request.source);
  const models = await Promise.all(full.map(({ input }) => openModel(input)));
  const united = vocabularyOf(models, request);
  const rules = rowRules(request.rules, models);
  const template = models[0];
  const least = firstFree(united.ids, request.source === 'union' ? template.rows : 0);
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
    const origins = models.map((_, own) => rowOrigins(own, tokens, models, rules));
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
    const report = await vocabularyReport({ models, united, origins, tokens, request, tokenizer, rows });
    const of = (input: MergeInput) => replaced.get(input) ?? input;
    return {
      experts: experts.map(of),
      base: base && of(base),
      folder: tokenizer,
      report,
      notes: describeVocabulary(report),
      dispose,
    };
  } catch (error) {
    await dispose();
    throw error;
  }
}

export interface OpenModel {
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

function vocabularyOf(models: readonly OpenModel[], { source, rules }: VocabularyRequest): UnitedVocabulary {
  const [first] = models;
  const other = models.find(({ columns }) => columns !== first.columns);
  if (other)
    throw new RecipeError(
      `${other.input.place.path}: its embedding has ${other.columns} columns, and the base's ${first.columns}`,
    );
  const asked = Object.keys(rules);
  if (source === 'union') {
    const rows = models.map((model) => model.rows);
    const united = uniteVocabularies(
      models.map(({ vocabulary }) => vocabulary),
      rows,
    );
    return withTokens(united, asked, rows[0]);
  }
  const { ids, rows } = chosen(models, source);
  return withTokens({ ids, appended: [], conflicts: [] }, asked, rows);
}

function chosen<T extends { readonly input: MergeInput }>(models: readonly T[], source: string): T {
  return modelNamed(models, source, `--tokenizer ${source}: is neither union nor one of the models`);
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
  const from = source === 'union' ? models[0] : chosen(models, source);
  if (united.appended.length === 0 && source !== 'union') return from.folder;
  await copyModelFiles(from.folder, folder);
  try {
    await copyFile(join(models[0].folder, 'generation_config.json'), join(folder, 'generation_config.json'));
  } catch {
    // There is none.
  }
  if (united.appended.length === 0) return folder;
  const json = unitedTokenizer(from.vocabulary, united);
  const seen = new Set<string>();
  const contents = (json['added_tokens'] as { content: string }[]).map(({ content }) => content);
  const twice = contents.find((content) => seen.size === seen.add(content).size);
  if (twice !== undefined)
    throw new RecipeError(`--tokenizer ${source}: two tokens that are added spell ${JSON.stringify(twice)}`);
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
