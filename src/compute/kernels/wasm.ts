/** WASM modules and memories; the compiler's library knows `WebAssembly` only together with the browser's DOM. */
declare const WebAssembly: {
  readonly Module: new (bytes: Uint8Array) => object;
  readonly Instance: new (module: object, imports: object) => { readonly exports: object };
  readonly Memory: new (limits: { initial: number; maximum: number; shared: true }) => SharedMemory;
};

export const PAGE_BYTES = 65_536;
/** What a 32-bit address reaches. */
export const MOST_PAGES = 65_536;

/** Memory that threads may share; grown, it stays where it is, and so do its views. */
export interface SharedMemory {
  readonly buffer: SharedArrayBuffer;
  grow(pages: number): number;
}

export function createSharedMemory(): SharedMemory {
  return new WebAssembly.Memory({ initial: 1, maximum: MOST_PAGES, shared: true });
}

const modules = new Map<string, object>();

/** A new instance of a module, in base64, that is compiled once. @param memory where it imports one */
export function instantiate<Exports extends object>(base64: string, memory?: SharedMemory): Exports {
  const module = modules.get(base64) ?? new WebAssembly.Module(Buffer.from(base64, 'base64'));
  modules.set(base64, module);
  return new WebAssembly.Instance(module, { env: { abort: () => undefined, ...(memory && { memory }) } }).exports as Exports;
}
