/** The Engine on tfjs: it interprets the graph, an ONNX operator at a time, on whatever backend tfjs has. */
import { availableParallelism } from 'node:os';
import type { Node, OnnxModel } from '../../formats/onnx/model.ts';
import { openOnnx } from '../../formats/onnx/reader.ts';
import { EnvironmentError, RecipeError, UnsupportedError } from '../errors.ts';
import type { CompileOptions, Device, Engine, NdArray, Program, ResidentArray } from './engine.ts';
import { createEngine, type EngineOptions } from './ort.ts';
import { PlainEngine } from './plain.ts';
import { ProgramPool } from './program-pool.ts';
import { ARITHMETIC } from './tfjs/arithmetic.ts';
import { LAYOUT } from './tfjs/layout.ts';
import { NETWORK } from './tfjs/network.ts';
import { Call, type Operator } from './tfjs/operator.ts';
import { loadTfjs } from './tfjs/runtime.ts';
import { fromTfValue, type Tf, type TfValue, tfDtype, toTfValue } from './tfjs/values.ts';

const OPERATORS: ReadonlyMap<string, Operator> = new Map(Object.entries({ ...ARITHMETIC, ...LAYOUT, ...NETWORK }));
const DOMAINS: ReadonlySet<string> = new Set(['', 'com.microsoft']);

export interface TfjsOptions extends EngineOptions {
  /** A tfjs module to run on instead of @tensorflow/tfjs-node-gpu. */
  readonly tf?: Tf;
}

/**
 * Starts an engine on @tensorflow/tfjs-node-gpu, on `cpu`, on `cuda`, or with `auto` on what that package finds. tfjs has neither
 * fp64 nor 64-bit integers: I64 is computed in 32 bits (values beyond are refused), F64 graphs are left to `doublePrecision`.
 * Throws EnvironmentError TFJS_MISSING when the package is not installed, DEVICE_UNAVAILABLE when it finds no GPU for `cuda`, and
 * RecipeError for devices tfjs does not have.
 */
export async function createTfjsEngine(options: TfjsOptions = {}): Promise<Engine> {
  const request = options.device ?? 'cpu';
  if (request !== 'cpu' && request !== 'cuda' && request !== 'auto') {
    throw new RecipeError(`--device ${request}: --engine tfjs runs on cpu, cuda or auto`);
  }
  const threads = options.threads ?? availableParallelism();
  const { tf, usesGpu, runtime } = await loadTfjs({ tf: options.tf, cpuOnly: request === 'cpu', threads });
  if (request === 'cuda' && !usesGpu) {
    const message = `cuda is not available: ${runtime} found no GPU it can use. It needs CUDA 11 and cuDNN 8; use --device cpu, or --engine ort.`;
    if (options.allowFallback !== true) throw new EnvironmentError('DEVICE_UNAVAILABLE', message);
    options.onNote?.(`${message} Running on cpu instead.`);
  }
  return new TfjsEngine(tf, usesGpu ? 'cuda' : 'cpu', threads, runtime, options.onNote);
}

class TfjsEngine implements Engine {
  readonly name = 'tfjs';
  readonly device: Device;
  readonly threads: number;
  readonly runtime: string;
  readonly #tf: Tf;
  readonly #onNote: ((note: string) => void) | undefined;
  readonly #pool = new ProgramPool();
  #companion: Promise<Engine> | undefined;

  constructor(tf: Tf, device: Device, threads: number, runtime: string, onNote: ((note: string) => void) | undefined) {
    this.#tf = tf;
    this.device = device;
    this.threads = threads;
    this.runtime = runtime;
    this.#onNote = onNote;
  }

  async compile(model: OnnxModel, options: CompileOptions = {}): Promise<Program> {
    const subject = `graph "${model.graph.name}"`;
    return this.#pool.get(subject, options, (onRelease) => TfjsProgram.create(this.#tf, model, subject, onRelease));
  }

  async open(path: string, options: CompileOptions = {}): Promise<Program> {
    return this.#pool.get(path, options, async (onRelease) => {
      await using file = await openOnnx(path);
      return await TfjsProgram.create(this.#tf, file.model, path, onRelease);
    });
  }

  async upload(array: NdArray): Promise<ResidentArray> {
    return new TfjsArray(array, toTfValue(this.#tf, array, 'an uploaded array'));
  }

  doublePrecision(): Promise<Engine> {
    this.#companion ??= this.#startCompanion();
    return this.#companion;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#pool[Symbol.asyncDispose]();
    await (await this.#companion)?.[Symbol.asyncDispose]();
  }

  async #startCompanion(): Promise<Engine> {
    try {
      return await createEngine({ device: 'cpu', threads: this.threads });
    } catch (error) {
      if (!(error instanceof EnvironmentError) || error.code !== 'ORT_MISSING') throw error;
      this.#onNote?.('onnxruntime-node is not installed: products in fp64 run in plain loops on one core, many times slower');
      return new PlainEngine();
    }
  }
}

/** An array whose elements are on the backend already. */
class TfjsArray implements ResidentArray {
  readonly dtype: NdArray['dtype'];
  readonly shape: NdArray['shape'];
  readonly data: NdArray['data'];
  readonly value: TfValue;

  constructor({ dtype, shape, data }: NdArray, value: TfValue) {
    this.dtype = dtype;
    this.shape = shape;
    this.data = data;
    this.value = value;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.value.tensor.dispose();
  }
}

class TfjsProgram implements Program {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly #tf: Tf;
  readonly #subject: string;
  readonly #nodes: readonly Node[];
  readonly #constants: ReadonlyMap<string, TfValue>;
  readonly #onRelease: () => void;
  #released = false;

  private constructor(
    tf: Tf,
    { graph }: OnnxModel,
    subject: string,
    constants: ReadonlyMap<string, TfValue>,
    onRelease: () => void,
  ) {
    this.#tf = tf;
    this.#subject = subject;
    this.#nodes = graph.nodes;
    this.#constants = constants;
    this.#onRelease = onRelease;
    this.inputNames = graph.inputs.map(({ name }) => name);
    this.outputNames = graph.outputs.map(({ name }) => name);
  }

  /** Refuses, before anything runs, operators and element types that the interpreter lacks. */
  static async create(tf: Tf, model: OnnxModel, subject: string, onRelease: () => void): Promise<TfjsProgram> {
    const { graph } = model;
    for (const { op, domain } of graph.nodes) {
      if (OPERATORS.has(op) && DOMAINS.has(domain)) continue;
      throw new UnsupportedError(
        `${subject}: the tfjs engine has no operator ${domain === '' ? op : `${domain}.${op}`}; use --engine ort`,
      );
    }
    for (const { name, dtype } of [...graph.inputs, ...graph.outputs]) tfDtype(dtype, `${subject}: "${name}"`);
    const constants = new Map<string, TfValue>();
    for (const initializer of graph.initializers.values()) {
      const { name, dtype, shape } = initializer;
      const at = `${subject}: initializer "${name}"`;
      const data = elementsOf(await initializer.read(), tfDtype(dtype, at), dtype === 'I64');
      constants.set(name, toTfValue(tf, { dtype, shape, data }, at));
    }
    return new TfjsProgram(tf, model, subject, constants, onRelease);
  }

  async run(
    feeds: Readonly<Record<string, NdArray>>,
    options: { readonly outputs?: readonly string[]; readonly into?: Readonly<Record<string, NdArray>> } = {},
  ): Promise<Record<string, NdArray>> {
    if (this.#released) throw new Error(`${this.#subject}: the program was released`);
    const { outputs = this.outputNames, into = {} } = options;
    const values = new RunValues(this.#constants);
    try {
      for (const name of this.inputNames) {
        const array = feeds[name];
        const at = `${this.#subject}: input "${name}"`;
        if (array === undefined) throw new Error(`${at} is missing in the feeds`);
        if (array instanceof TfjsArray) values.lend(name, array.value);
        else values.own(name, toTfValue(this.#tf, array, at));
      }
      this.#interpret(values, outputs);
      const results: Record<string, NdArray> = {};
      for (const name of outputs) {
        const made = await fromTfValue(values.get(name, this.#subject));
        results[name] = delivered(made, into[name], `${this.#subject}: output "${name}"`);
      }
      return results;
    } finally {
      values.dispose();
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#released) return;
    this.#released = true;
    this.#onRelease();
    for (const { tensor } of this.#constants.values()) tensor.dispose();
  }

  /** Runs what the outputs depend on; a value is freed as soon as nothing needs it any more. */
  #interpret(values: RunValues, outputs: readonly string[]): void {
    const nodes = neededFor(this.#nodes, outputs);
    const lastUse = new Map<string, number>();
    nodes.forEach((node, index) => {
      for (const name of node.inputs) lastUse.set(name, index);
    });
    for (const name of outputs) lastUse.set(name, nodes.length);
    nodes.forEach((node, index) => {
      const inputs = node.inputs.map((name) => (name === '' ? undefined : values.get(name, this.#subject)));
      const call = new Call(this.#tf, node, inputs);
      const made: (TfValue | undefined)[] = [];
      this.#tf.tidy(() => {
        made.push(...OPERATORS.get(node.op)!(call));
        return made.flatMap((value) => (value === undefined ? [] : [value.tensor]));
      });
      node.outputs.forEach((name, i) => {
        const value = made[i];
        if (name === '') value?.tensor.dispose();
        else if (value === undefined) call.refuse(`output ${i}`);
        else values.own(name, value);
      });
      for (let i = node.outputs.length; i < made.length; i++) made[i]?.tensor.dispose();
      for (const name of [...node.inputs, ...node.outputs]) if ((lastUse.get(name) ?? -1) <= index) values.free(name);
    });
  }
}

/** The values of one run: those it made and frees, those it was lent. */
class RunValues {
  readonly #values: Map<string, TfValue>;
  readonly #owned = new Set<string>();

  constructor(constants: ReadonlyMap<string, TfValue>) {
    this.#values = new Map(constants);
  }

  lend(name: string, value: TfValue): void {
    this.#values.set(name, value);
  }

  own(name: string, value: TfValue): void {
    this.#values.set(name, value);
    this.#owned.add(name);
  }

  get(name: string, subject: string): TfValue {
    const value = this.#values.get(name);
    if (value === undefined) throw new Error(`${subject}: nothing makes "${name}"`);
    return value;
  }

  free(name: string): void {
    if (!this.#owned.delete(name)) return;
    this.#values.get(name)?.tensor.dispose();
    this.#values.delete(name);
  }

  dispose(): void {
    for (const name of [...this.#owned]) this.free(name);
  }
}

/** The nodes that the named values depend on, in order. */
function neededFor(nodes: readonly Node[], outputs: readonly string[]): Node[] {
  const needed = new Set(outputs);
  const kept: Node[] = [];
  for (const node of [...nodes].reverse()) {
    if (!node.outputs.some((name) => needed.has(name))) continue;
    kept.push(node);
    for (const name of node.inputs) needed.add(name);
  }
  return kept.reverse();
}

/** An initializer's little-endian bytes as elements. */
function elementsOf(bytes: Uint8Array, type: 'float32' | 'int32' | 'bool', wide: boolean): NdArray['data'] {
  if (type === 'bool') return bytes;
  // A copy: the bytes may begin anywhere in memory that is read into again.
  const { buffer } = bytes.slice();
  if (type === 'float32') return new Float32Array(buffer);
  return wide ? new BigInt64Array(buffer) : new Int32Array(buffer);
}

/** A result in the caller's memory when there is one; else in memory of its own, which no feed, constant or later run shares. */
function delivered(made: NdArray, target: NdArray | undefined, at: string): NdArray {
  if (target === undefined) return { ...made, data: made.data.slice() };
  if (target.dtype !== made.dtype || target.shape.join() !== made.shape.join()) {
    throw new Error(`${at} is ${made.dtype} (${made.shape.join(', ')}), not ${target.dtype} (${target.shape.join(', ')})`);
  }
  (target.data as Float32Array).set(made.data as Float32Array);
  return target;
}
