// A certified OpenID Connect provider (npm oidc-provider) with new keys at each start.
// node oidc_provider.mjs FOLDER-OF-node_modules PORT
import { generateKeyPairSync, randomUUID } from 'node:crypto';

const [folder, port] = process.argv.slice(2);
const { Provider } = await import(`${folder}/oidc-provider/lib/index.js`);
const scope = 'sandboxes:read sandboxes:write code:run admin';
const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 });
const key = { ...privateKey.export({ format: 'jwk' }), kid: randomUUID(), use: 'sig', alg: 'RS256' };
const client = (id) => ({
  client_id: id,
  client_secret: `secret-of-${id}-in-a-test`,
  grant_types: ['client_credentials'],
  redirect_uris: [],
  response_types: [],
});
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [client('anna-agent'), client('ben-agent')],
  jwks: { keys: [key] },
  scopes: scope.split(' '),
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      getResourceServerInfo: (ctx, resource) => ({
        scope,
        audience: resource,
        accessTokenFormat: 'jwt',
        accessTokenTTL: 600,
        jwt: { sign: { alg: 'RS256' } },
      }),
    },
  },
});
provider.listen(Number(port), '127.0.0.1', () => console.log('listening'));
