/** The Engine on onnxruntime-node: cpu, webgpu, cuda, dml, coreml. */
import { availableParallelism } from 'node:os';
import type { InferenceSession, Tensor as OrtTensor } from 'onnxruntime-node';
import type { OnnxModel } from '../../formats/onnx/model.ts';
import { encodeOnnx } from '../../formats/onnx/writer.ts';
import { chooseDevice, type DeviceProbe } from './devices.ts';
import type { CompileOptions, Device, DeviceRequest, Engine, NdArray, Program, ResidentArray } from './engine.ts';
import { literalGraph } from './literal-graph.ts';
import { deviceUnavailable, type OrtContext, translateOrtError } from './ort-errors.ts';
import { OrtResidentArray, OrtUploader } from './ort-resident.ts';
import { ensureRuntimeFolder, forbidRoundedProducts, loadOrt, type Ort } from './ort-runtime.ts';
import { fromOrtTensor, toOrtTensor } from './ort-tensors.ts';
import { ProgramPool } from './program-pool.ts';

export interface EngineOptions {
  /** Default 'cpu'. Only `auto` falls back by itself. */
  readonly device?: DeviceRequest | undefined;
  /** Threads of one operator on the CPU; default all cores. */
  readonly threads?: number | undefined;
  /** Turns an explicit device that is not available into a note and the CPU. */
  readonly allowFallback?: boolean | undefined;
  /** Refuses graphs of which the device would leave nodes to the CPU, instead of running those there silently. */
  readonly strictDevice?: boolean | undefined;
  /** Told, once each, what the user should know about the choice of the device. */
  readonly onNote?: ((note: string) => void) | undefined;
}

/**
 * Starts an engine on the device asked for. Throws EnvironmentError ORT_MISSING when onnxruntime-node is not installed and
 * DEVICE_UNAVAILABLE when the device fails its probe. Dispose the engine to release its sessions.
 */
export async function createEngine(options: EngineOptions = {}): Promise<Engine> {
  const ort = await loadOrt();
  const threads = options.threads ?? availableParallelism();
  const request = options.device ?? 'cpu';
  if (request === 'auto' || request === 'webgpu') ensureRuntimeFolder();
  if (request === 'auto' || request === 'cuda') forbidRoundedProducts();
  const settings = { threads, strict: options.strictDevice ?? false };
  const { device, notes } = await chooseDevice(request, probeOf(ort, threads), options.allowFallback);
  for (const note of notes) options.onNote?.(note);
  return new OrtEngine(ort, device, settings);
}

interface Settings {
  readonly threads: number;
  readonly strict: boolean;
}

// Every session has threads of its own; those of one that has just run would spin on the cores that the next one needs.
// Measured on two busy cores, three sessions in turn: 3 to 4 times faster without spinning.
const SHARED_CORES = { intra_op: { allow_spinning: '0' } };

class OrtEngine implements Engine {
  readonly name = 'ort';
  readonly device: Device;
  readonly threads: number;
  readonly runtime: string;
  readonly #ort: Ort;
  readonly #settings: Settings;
  readonly #pool = new ProgramPool();
  readonly #uploader: OrtUploader | undefined;
  /** Only WebGPU keeps tensors between runs: the others copy every feed from the host. */
  readonly upload?: (array: NdArray) => Promise<ResidentArray>;
  #companion: OrtEngine | undefined;

  constructor(ort: Ort, device: Device, settings: Settings) {
    this.#ort = ort;
    this.#settings = settings;
    this.device = device;
    this.threads = settings.threads;
    if (device === 'webgpu') {
      const uploader = new OrtUploader(ort);
      this.#uploader = uploader;
      this.upload = (array) => uploader.upload(array);
    }
    this.runtime = `onnxruntime-node ${ort.env.versions.node ?? ort.env.versions.common}`;
  }

  async compile(model: OnnxModel, options: CompileOptions = {}): Promise<Program> {
    const subject = `graph "${model.graph.name}"`;
    return this.#pool.get(subject, options, async (onRelease) =>
      this.#create(subject, await encodeOnnx(model), options, onRelease),
    );
  }

  async open(path: string, options: CompileOptions = {}): Promise<Program> {
    return this.#pool.get(path, options, (onRelease) => this.#create(path, path, options, onRelease));
  }

  async doublePrecision(): Promise<Engine> {
    // Of the providers only the CPU's has fp64 for every operator we use.
    if (this.device === 'cpu') return this;
    this.#companion ??= new OrtEngine(this.#ort, 'cpu', { threads: this.threads, strict: false });
    return this.#companion;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#pool[Symbol.asyncDispose]();
    await this.#uploader?.[Symbol.asyncDispose]();
    await this.#companion?.[Symbol.asyncDispose]();
  }

  async #create(
    subject: string,
    model: string | Uint8Array,
    { optimization = 'all', memoryArena = true }: CompileOptions,
    onRelease: () => void,
  ): Promise<Program> {
    const context = { device: this.device, subject };
    const sessionOptions: InferenceSession.SessionOptions = {
      executionProviders: [this.device],
      intraOpNumThreads: this.threads,
      graphOptimizationLevel: optimization,
      enableCpuMemArena: memoryArena,
      extra: { session: { ...SHARED_CORES, ...(this.#settings.strict && { disable_cpu_ep_fallback: '1' }) } },
    };
    let session: InferenceSession;
    try {
      session =
        typeof model === 'string'
          ? await this.#ort.InferenceSession.create(model, sessionOptions)
          : await this.#ort.InferenceSession.create(model, sessionOptions);
    } catch (cause) {
      throw translateOrtError(cause, context);
    }
    return new OrtProgram(this.#ort, session, context, onRelease);
  }
}

class OrtProgram implements Program {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly #ort: Ort;
  readonly #session: InferenceSession;
  readonly #context: OrtContext;
  readonly #onRelease: () => void;
  #released = false;

  constructor(ort: Ort, session: InferenceSession, context: OrtContext, onRelease: () => void) {
    this.#ort = ort;
    this.#session = session;
    this.#context = context;
    this.#onRelease = onRelease;
    this.inputNames = session.inputNames;
    this.outputNames = session.outputNames;
  }

  async run(
    feeds: Readonly<Record<string, NdArray>>,
    options: { readonly outputs?: readonly string[]; readonly into?: Readonly<Record<string, NdArray>> } = {},
  ): Promise<Record<string, NdArray>> {
    const { subject } = this.#context;
    if (this.#released) throw new Error(`${subject}: the program was released`);
    const inputs: Record<string, OrtTensor> = {};
    for (const name of this.inputNames) {
      const array = feeds[name];
      if (array === undefined) throw new Error(`${subject}: input "${name}" is missing in the feeds`);
      inputs[name] =
        array instanceof OrtResidentArray ? array.tensor : toOrtTensor(this.#ort, array, `${subject}: input "${name}"`);
    }
    const { outputs = this.outputNames, into = {} } = options;
    const wanted: Record<string, OrtTensor | null> = {};
    for (const name of outputs) {
      const array = into[name];
      wanted[name] = array === undefined ? null : toOrtTensor(this.#ort, array, `${subject}: output "${name}"`);
    }
    let results: InferenceSession.ReturnType;
    try {
      results = await this.#session.run(inputs, wanted);
    } catch (cause) {
      throw translateOrtError(cause, this.#context);
    }
    return Object.fromEntries(
      outputs.map((name) => [name, into[name] ?? fromOrtTensor(results[name], `${subject}: output "${name}"`)]),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#released) return;
    this.#released = true;
    this.#onRelease();
    await this.#session.release();
  }
}

const PROBE = literalGraph('device probe', {
  inputs: { a: ['F32', 'm', 'k'], b: ['F32', 'k', 'n'] },
  outputs: { y: ['F32', 'm', 'n'] },
  nodes: [{ op: 'MatMul', inputs: ['a', 'b'], output: 'y' }],
});

const TIMED_SIZE = 512;
const TIMED_RUNS = 3;

function probeOf(ort: Ort, threads: number): DeviceProbe {
  const start = (device: Device): OrtEngine => new OrtEngine(ort, device, { threads, strict: false });
  return {
    platform: process.platform,
    async check(device) {
      await using engine = start(device);
      const a: NdArray = { dtype: 'F32', shape: [1, 2], data: Float32Array.of(2, 3) };
      const b: NdArray = { dtype: 'F32', shape: [2, 1], data: Float32Array.of(5, 7) };
      let product: number;
      try {
        const program = await engine.compile(PROBE);
        product = Number((await program.run({ a, b }))['y'].data[0]);
      } catch (cause) {
        // Whatever the runtime says while it tries the smallest product means that the device is of no use.
        throw deviceUnavailable(device, cause instanceof Error && cause.cause instanceof Error ? cause.cause : cause);
      }
      if (product !== 31) throw deviceUnavailable(device, `2 * 5 + 3 * 7 gave ${product} on it`);
    },
    async time(device) {
      await using engine = start(device);
      const program = await engine.compile(PROBE);
      const a: NdArray = { dtype: 'F32', shape: [TIMED_SIZE, TIMED_SIZE], data: new Float32Array(TIMED_SIZE ** 2).fill(1) };
      await program.run({ a, b: a });
      let best = Number.POSITIVE_INFINITY;
      for (let i = 0; i < TIMED_RUNS; i++) {
        const begin = performance.now();
        await program.run({ a, b: a });
        best = Math.min(best, performance.now() - begin);
      }
      return best;
    },
  };
}
