// Runs jobs in transformers.js: node transformers_js.mjs PACKAGES JOBS.json RESULTS.json
// PACKAGES is a folder with node_modules. A job is {kind, folder, ...}; its result is an object, or {error: message}.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const [packages, jobs, results] = process.argv.slice(2);
const require = createRequire(path.join(packages, 'index.js'));
const transformers = require('@huggingface/transformers');
const { env } = transformers;
env.allowRemoteModels = false;
env.useFSCache = false;

const plain = (tensor) => ({ dims: tensor.dims.map(Number), data: Array.from(tensor.data, Number) });

const tensors = (Tensor, inputs) =>
    Object.fromEntries(
        Object.entries(inputs).map(([name, { type, data, dims }]) => {
            const values = type === 'int64' ? BigInt64Array.from(data, BigInt) : Float32Array.from(data);
            return [name, new Tensor(type, values, dims)];
        }),
    );

const runs = {
    // Token embeddings of texts, without pooling.
    async features({ folder, texts }) {
        const extract = await transformers.pipeline('feature-extraction', folder);
        return plain(await extract(texts, { pooling: 'none' }));
    },
    // One output of a model, loaded by the class of this name.
    async output({ folder, model, inputs, output }) {
        const loaded = await transformers[model].from_pretrained(folder);
        return plain((await loaded(tensors(transformers.Tensor, inputs)))[output]);
    },
    // The most likely tokens after a prompt, one after the other.
    async tokens({ folder, ids, count }) {
        const model = await transformers.AutoModelForCausalLM.from_pretrained(folder);
        const input_ids = new transformers.Tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]);
        const found = await model.generate({ inputs: input_ids, max_new_tokens: count, do_sample: false, eos_token_id: null });
        return { tokens: Array.from(found.data, Number) };
    },
    // The first output of a file in the WebAssembly backend that browsers use.
    async wasm({ file, inputs }) {
        const ort = require('onnxruntime-web');
        ort.env.wasm.numThreads = 1;
        const options = { executionProviders: ['wasm'] };
        const beside = `${file}_data`;
        if (fs.existsSync(beside)) options.externalData = [{ path: path.basename(beside), data: fs.readFileSync(beside) }];
        const session = await ort.InferenceSession.create(fs.readFileSync(file), options);
        const found = await session.run(tensors(ort.Tensor, inputs));
        return plain(found[session.outputNames[0]]);
    },
};

const found = [];
for (const job of JSON.parse(fs.readFileSync(jobs))) {
    try {
        found.push(await runs[job.kind](job));
    } catch (error) {
        found.push({ error: String(error?.message ?? error) });
    }
}
fs.writeFileSync(results, JSON.stringify(found));
