// Two surfaces under one camera, one light and one shader: left and right half of one canvas.

import * as THREE from 'three';
import { OrbitControls } from 'three/addons/controls/OrbitControls.js';
import { GLTFLoader } from 'three/addons/loaders/GLTFLoader.js';

const CLAY = 0xc7c2ba;
const BACKGROUND = 0xe9ebee;
const FIELD_OF_VIEW = 20; // degrees: close to none of the distortion of a near camera
const YAW = { front: 0, 'three-quarter': 0.7, side: Math.PI / 2 };
const SWING = { angle: 1.05, seconds: 8 }; // of the automatic turn, to either side

// Grey by distance along the line of sight: near is light.
const DEPTH = {
  side: THREE.DoubleSide,
  uniforms: { near: { value: 0 }, far: { value: 1 } },
  vertexShader: `
    varying float along;
    void main() {
      vec4 seen = modelViewMatrix * vec4(position, 1.0);
      along = -seen.z;
      gl_Position = projectionMatrix * seen;
    }`,
  fragmentShader: `
    uniform float near;
    uniform float far;
    varying float along;
    void main() {
      gl_FragColor = vec4(vec3(1.0 - 0.95 * clamp((along - near) / (far - near), 0.0, 1.0)), 1.0);
    }`,
};

export class Viewer {
  /** box: {lo, hi}, world positions of the volume that is shown. */
  constructor(canvas, box) {
    this.canvas = canvas;
    this.renderer = new THREE.WebGLRenderer({ canvas, antialias: true });
    this.renderer.setScissorTest(true);
    this.renderer.setClearColor(BACKGROUND);

    const lo = new THREE.Vector3(...box.lo);
    const hi = new THREE.Vector3(...box.hi);
    this.centre = lo.clone().add(hi).multiplyScalar(0.5);
    this.radius = hi.distanceTo(lo) / 2;
    this.distance = (0.8 * this.radius) / Math.sin(THREE.MathUtils.degToRad(FIELD_OF_VIEW / 2));
    this.camera = new THREE.PerspectiveCamera(FIELD_OF_VIEW);

    // The light comes along with the camera, so both sides always look alike.
    const key = new THREE.DirectionalLight(0xffffff, 2.4);
    key.position.set(-0.9, 0.8, 0.8);
    const fill = new THREE.DirectionalLight(0xffffff, 0.7);
    fill.position.set(0.5, -0.1, 1);
    this.camera.add(key, fill, key.target, fill.target);
    key.target.position.set(0, 0, -1);
    fill.target.position.set(0, 0, -1);
    this.scene = new THREE.Scene();
    this.scene.add(this.camera, new THREE.AmbientLight(0xffffff, 0.45));

    this.materials = {
      surface: new THREE.MeshStandardMaterial({ color: CLAY, roughness: 0.85, side: THREE.DoubleSide }),
      color: new THREE.MeshBasicMaterial({ vertexColors: true, side: THREE.DoubleSide }),
      normals: new THREE.MeshNormalMaterial({ side: THREE.DoubleSide }),
      depth: new THREE.ShaderMaterial(DEPTH),
    };
    this.meshes = [0, 1].map(() => {
      const mesh = new THREE.Mesh(new THREE.BufferGeometry(), this.materials.surface);
      mesh.visible = false;
      this.scene.add(mesh);
      return mesh;
    });
    this.shown = [null, null];

    this.controls = new OrbitControls(this.camera, canvas);
    this.controls.minDistance = this.distance / 20;
    this.controls.maxDistance = this.distance * 4;
    this.controls.addEventListener('change', () => this.draw());
    this.loader = new GLTFLoader();
    this.turning = null;
    this.frame = null;
    this.look('front');
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener('webglcontextrestored', () => this.draw());
  }

  /** A surface from the server; an Error with the server's sentence where there is none. */
  async load(url) {
    const response = await fetch(url);
    if (!response.ok) throw new Error((await response.json()).error);
    const { scene } = await this.loader.parseAsync(await response.arrayBuffer(), '');
    let geometry = null;
    scene.traverse((object) => { if (object.isMesh) geometry = object.geometry; });
    return geometry;
  }

  /** Two geometries, or null where there is nothing to see; null for both clears the view. */
  show(left, right) {
    this.shown = [left, right];
    this.meshes.forEach((mesh, side) => { if (this.shown[side]) mesh.geometry = this.shown[side]; });
    this.shade(this.shading ?? { mode: 'surface', wireframe: false });
  }

  /** mode: surface, color, depth or normals. */
  shade(shading) {
    this.shading = shading;
    if (shading.mode === 'color') this.shown.forEach((geometry) => geometry && decodeColors(geometry));
    for (const [side, mesh] of this.meshes.entries()) {
      const colored = shading.mode !== 'color' || this.shown[side]?.attributes.color;
      mesh.material = this.materials[colored ? shading.mode : 'surface'];
      mesh.material.wireframe = shading.wireframe;
    }
    this.draw();
  }

  look(from) {
    const yaw = YAW[from];
    this.controls.target.copy(this.centre);
    this.camera.position
      .set(Math.sin(yaw), 0, Math.cos(yaw)).multiplyScalar(this.distance).add(this.centre);
    this.controls.update();
    this.draw();
  }

  /** By angles in radians: to the right, up. */
  turn(right, up) {
    const offset = this.camera.position.clone().sub(this.controls.target);
    const at = new THREE.Spherical().setFromVector3(offset);
    at.theta -= right;
    at.phi += up;
    at.makeSafe();
    this.camera.position.setFromSpherical(at).add(this.controls.target);
    this.controls.update();
  }

  /** By shares of the height of the view. */
  move(right, up) {
    const offset = this.camera.position.clone().sub(this.controls.target);
    const height = 2 * offset.length() * Math.tan(THREE.MathUtils.degToRad(FIELD_OF_VIEW / 2));
    const shift = new THREE.Vector3(-right * height, -up * height, 0).applyQuaternion(this.camera.quaternion);
    this.camera.position.add(shift);
    this.controls.target.add(shift);
    this.controls.update();
  }

  zoom(factor) {
    const offset = this.camera.position.clone().sub(this.controls.target).divideScalar(factor);
    offset.clampLength(this.controls.minDistance, this.controls.maxDistance);
    this.camera.position.copy(this.controls.target).add(offset);
    this.controls.update();
  }

  autoTurn(on) {
    this.turning = on ? { since: null, angle: 0 } : null;
    this.draw();
  }

  /** Once, before the screen is next refreshed; nothing is drawn while nothing moves. */
  draw() {
    this.frame ??= requestAnimationFrame((now) => {
      this.frame = null;
      if (this.turning) {
        this.turning.since ??= now;
        const phase = (2 * Math.PI * (now - this.turning.since)) / (1000 * SWING.seconds);
        const angle = SWING.angle * Math.sin(phase);
        this.turn(angle - this.turning.angle, 0); // the controls ask for the next frame
        this.turning.angle = angle;
        this.draw();
      }
      this.drawNow();
    });
  }

  drawNow() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (!width || !height) return;
    const ratio = Math.min(window.devicePixelRatio, 2);
    if (this.renderer.getPixelRatio() !== ratio) this.renderer.setPixelRatio(ratio);
    const size = this.renderer.getSize(new THREE.Vector2());
    if (size.x !== width || size.y !== height) this.renderer.setSize(width, height, false);

    const distance = this.camera.position.distanceTo(this.controls.target);
    this.camera.aspect = width / 2 / height;
    this.camera.near = Math.max(distance - 2 * this.radius, this.radius / 50);
    this.camera.far = distance + 2 * this.radius;
    // A narrow half must hold the whole width.
    const half = Math.tan(THREE.MathUtils.degToRad(FIELD_OF_VIEW / 2)) / Math.min(1, this.camera.aspect);
    this.camera.fov = THREE.MathUtils.radToDeg(2 * Math.atan(half));
    this.camera.updateProjectionMatrix();
    const { near, far } = this.materials.depth.uniforms;
    near.value = distance - 0.6 * this.radius;
    far.value = distance + 0.6 * this.radius;

    for (const side of [0, 1]) {
      this.meshes.forEach((mesh, other) => { mesh.visible = other === side && !!this.shown[side]; });
      const x = side === 0 ? 0 : Math.ceil(width / 2);
      this.renderer.setViewport(x, 0, width / 2, height);
      this.renderer.setScissor(x, 0, width / 2, height);
      this.renderer.render(this.scene, this.camera);
    }
  }
}

/** Colours come as sRGB bytes, which the shader would take for linear ones; once a geometry. */
function decodeColors(geometry) {
  const bytes = geometry.attributes.color;
  if (!bytes || geometry.userData.decoded) return;
  const linear = new Float32Array(3 * bytes.count);
  const color = new THREE.Color();
  for (let i = 0; i < bytes.count; i++) {
    color.setRGB(bytes.getX(i), bytes.getY(i), bytes.getZ(i), THREE.SRGBColorSpace);
    color.toArray(linear, 3 * i);
  }
  geometry.setAttribute('color', new THREE.BufferAttribute(linear, 3));
  geometry.userData.decoded = true;
}
