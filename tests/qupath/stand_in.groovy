/*
 * QuPath and the Deep Java Library, as far as the scripts in examples/qupath use them.
 *
 *   groovy stand_in.groovy SCRIPT SLIDE.png UM_PER_PX DETECTIONS.geojson OUT.json [argument of SCRIPT …]
 *
 * Detections are features of a file as QuPath writes it. OUT holds what the script has left of each
 * by its id: class, colour, measurements. The library's predictor appends the patches that it is
 * given to OUT.patches and answers with numbers of its own: 0, 0.1, 0.2 …
 */
import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import javax.imageio.ImageIO
import org.codehaus.groovy.control.CompilerConfiguration

def (script, slide, mpp, detections, out) = args as List

LIBRARY = [
    '''package qupath.lib.regions
       class RegionRequest {
           String path; double downsample; int x, y, width, height
           static createInstance(String path, double downsample, int x, int y, int width, int height) {
               new RegionRequest(path: path, downsample: downsample, x: x, y: y, width: width, height: height)
           }
       }''',
    '''package ai.djl.ndarray.types
       enum DataType { UINT8 }''',
    '''package ai.djl.ndarray.types
       class Shape { long[] sizes; Shape(long... sizes) { this.sizes = sizes } }''',
    '''package ai.djl.ndarray
       class NDList extends ArrayList { NDList(Object... arrays) { super(arrays as List) } }''',
    '''package ai.djl.translate
       class NoopTranslator { }''',
    '''package ai.djl.repository.zoo
       class Criteria {
           static calls = []
           static builder() { new Criteria() }
           def invokeMethod(String name, Object given) {
               calls << name
               name == 'build' ? this : name == 'loadModel' ? Criteria.model : this
           }
           static model
       }''',
]
def loader = new GroovyClassLoader(this.class.classLoader)
LIBRARY.each { loader.parseClass(it) }

class Cell {
    Map feature, measurements = [:]
    String name
    Integer colour
    def getID() { UUID.fromString(feature.id) }
    def getMeasurementList() { this }
    void put(String key, double value) { measurements[key] = value }
    void setPathClass(given) { (name, colour) = [given.name, given.colour] }
    def getROI() {
        def ring = feature.geometry.coordinates[0]
        def xs = ring*.getAt(0), ys = ring*.getAt(1)
        [getBoundsX: { xs.min() }, getBoundsY: { ys.min() }, getBoundsWidth: { xs.max() - xs.min() },
         getBoundsHeight: { ys.max() - ys.min() }]
    }
}

def exported = new File(detections).getText('UTF-8')
def cells = new JsonSlurper().parseText(exported).features.collect { new Cell(feature: it) }
def image = ImageIO.read(new File(slide))
def pixels = new File(out + '.patches')
double answer = 0

def manager = [
    newSubManager: { manager }, close: { },
    create: { buffer, shape, type ->
        def bytes = new byte[buffer.remaining()]
        buffer.get(bytes)
        assert bytes.length == shape.sizes.inject(1) { a, b -> a * b } && type.name() == 'UINT8'
        pixels << bytes
        [count: shape.sizes[0], setName: { assert it == 'patches' }]
    },
]
manager.newSubManager = { manager }
loader.loadClass('ai.djl.repository.zoo.Criteria').model = [
    getBlock: { [getCustomMetadata: { new JsonSlurper().parse(new File(out + '.metadata')) }] },
    getNDManager: { manager },
    newPredictor: { [
        predict: { list ->
            def values = (0..<list[0].count).collect { (answer++ / 10) as float } as float[]
            [[getName: { 'embedding' }], [getName: { 'probability' }, toFloatArray: { values }]]
        },
        close: { }] },
    close: { },
]

class QuPath extends Script {
    static state
    def run() { }
    def getCurrentServer() { state.server }
    def getDetectionObjects() { state.cells }
    def getPathClass(String name, Integer colour = null) { [name: name, colour: colour] }
    void fireHierarchyUpdate() { state.updates++ }
    void exportObjectsToGeoJson(Collection objects, String path, String option) {
        assert option == 'FEATURE_COLLECTION' && objects.is(state.cells)
        new File(path).setText(state.exported, 'UTF-8')
    }
}
def region = { request ->
    def part = image.getSubimage(request.x, request.y, request.width, request.height)
    assert request.downsample == 1   // QuPath's resampling is not played
    part
}
QuPath.state = [
    cells: cells, exported: exported, updates: 0,
    server: [
        getURIs: { [new File(slide).toURI()] }, getPath: { slide }, readRegion: region,
        getWidth: { image.getWidth() }, getHeight: { image.getHeight() },
        getPixelCalibration: { [hasPixelSizeMicrons: { true },
                                getAveragedPixelSizeMicrons: { mpp as double }] },
    ],
]

def configuration = new CompilerConfiguration(scriptBaseClass: QuPath.name)
def binding = new Binding(args: args.drop(5) as String[])
def shell = new GroovyShell(loader, binding, configuration)
shell.evaluate(new File(script))
def left = cells.collectEntries { [it.feature.id, [it.name, it.colour, it.measurements]] }
new File(out).setText(JsonOutput.toJson([updates: QuPath.state.updates, cells: left]), 'UTF-8')
